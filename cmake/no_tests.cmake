# SPDX-License-Identifier: Apache-2.0
# The one test of a build without ament_cmake_pytest: it fails, because no test has run.
message(FATAL_ERROR "ament_cmake_pytest was not found when adatoken3d was configured, so that none of its tests is run. "
  "Install it (rosdep install --from-paths src --ignore-src -y) and build again, or run: make test")
