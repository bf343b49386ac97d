# SPDX-License-Identifier: Apache-2.0
"""From topics, and from bags, to posed frames."""
