# One header, dlpack.h, with the C exchange API: from the package apache-tvm-ffi, or, where that is not
# installed, from the headers that torch ships.  Neither is imported, linked or needed at run time.
set(VIOPS_DLPACK_DIR "" CACHE PATH "A folder that has dlpack/dlpack.h, instead of looking for one")

if(VIOPS_DLPACK_DIR)
  set(candidates ${VIOPS_DLPACK_DIR}/dlpack/dlpack.h)
else()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "
from importlib.util import find_spec
from pathlib import Path
for package, header in ('tvm_ffi', 'include/dlpack/dlpack.h'), ('torch', 'include/ATen/dlpack.h'):
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        print(Path(folder, header).as_posix(), end=';')
"
    OUTPUT_VARIABLE candidates)
endif()

foreach(candidate IN LISTS candidates)
  if(EXISTS "${candidate}")
    file(READ "${candidate}" text)
    if(text MATCHES "DLPackExchangeAPIHeader")
      set(VIOPS_DLPACK_HEADER "${candidate}")
      break()
    endif()
  endif()
endforeach()
if(NOT VIOPS_DLPACK_HEADER)
  message(FATAL_ERROR "No dlpack.h with the C exchange API was found; pip install apache-tvm-ffi, or name "
                      "its folder with -DVIOPS_DLPACK_DIR.  Looked at: ${candidates}")
endif()
message(STATUS "viops: dlpack.h from ${VIOPS_DLPACK_HEADER}")

add_library(viops_dlpack INTERFACE)
target_compile_definitions(viops_dlpack INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:VIOPS_DLPACK_HEADER="${VIOPS_DLPACK_HEADER}">)
