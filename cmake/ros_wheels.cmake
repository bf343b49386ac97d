# SPDX-License-Identifier: Apache-2.0
# For builds against the ROS 2 wheels of PyPI; a ROS installation needs nothing of this. CMAKE_PROJECT_INCLUDE brings it
# into project(), and it acts when the whole CMakeLists.txt has been read.

# The CMake targets that the wheels export still name include directories of the machine that the wheels were made on,
# and CMake refuses a target with an include directory that does not exist: those are taken out.
function(_ros_wheels_drop_missing_include_directories)
  get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(directories ${target} INTERFACE_INCLUDE_DIRECTORIES)
    if(NOT directories)
      continue()
    endif()
    set(present "")
    foreach(directory IN LISTS directories)
      if(directory MATCHES "^\\$<" OR EXISTS "${directory}")
        list(APPEND present "${directory}")
      endif()
    endforeach()
    set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${present}")
  endforeach()
endfunction()

# What is exported here must not have that defect too: NumPy's headers, the one directory that is named absolutely, serve
# this build alone. (CMake even refuses to export it where the virtual environment lies inside the source folder.)
function(_ros_wheels_keep_build_directories_out_of_export)
  get_property(targets DIRECTORY PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(directories ${target} INTERFACE_INCLUDE_DIRECTORIES)
    if(NOT directories)
      continue()
    endif()
    list(TRANSFORM directories REPLACE "^/.*$" "$<BUILD_INTERFACE:\\0>")
    set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${directories}")
  endforeach()
endfunction()

cmake_language(DEFER CALL _ros_wheels_drop_missing_include_directories)
cmake_language(DEFER CALL _ros_wheels_keep_build_directories_out_of_export)
