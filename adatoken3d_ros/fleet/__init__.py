# SPDX-License-Identifier: Apache-2.0
"""One engine for many robots: a service on Ray Serve, and the robot's side of it (extra `fleet`; docs/fleet.md)."""
