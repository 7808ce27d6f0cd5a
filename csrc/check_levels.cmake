# Fails when an object built for one CPU level defines a weak symbol: the linker keeps one copy of such a
# symbol for all levels, so that an older CPU could be given a newer one's instructions.
execute_process(COMMAND ${NM} -C ${OBJECT} OUTPUT_VARIABLE symbols RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${NM} cannot read ${OBJECT}")
endif()
string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX "DW\\.ref\\.")
if(weak)
  list(JOIN weak "\n" weak)
  message(FATAL_ERROR "${OBJECT} defines weak symbols; keep templates and inline functions local to "
                      "the file (see common/cpu_level.h):\n${weak}")
endif()
