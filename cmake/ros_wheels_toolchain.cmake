# SPDX-License-Identifier: Apache-2.0
# Lets an unmodified `colcon build` work against the ROS 2 wheels of PyPI, through the environment alone:
#   PATH=<venv>/bin:$PATH AMENT_PREFIX_PATH=<venv> CMAKE_TOOLCHAIN_FILE=<repository>/cmake/ros_wheels_toolchain.cmake
set(CMAKE_PROJECT_INCLUDE "${CMAKE_CURRENT_LIST_DIR}/ros_wheels.cmake" CACHE FILEPATH "See the file itself")
