# SPDX-License-Identifier: Apache-2.0
"""What people look at: a live page in the browser, and a report of answers that needs nothing but a browser."""
