# SPDX-License-Identifier: Apache-2.0
"""Posed RGB-D frames to spatial tokens: numpy and torch, no ROS."""
