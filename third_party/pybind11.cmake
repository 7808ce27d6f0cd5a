# The Python package of pybind11 brings its own CMake configuration; scikit-build-core finds it.
find_package(pybind11 2.13 CONFIG REQUIRED)
