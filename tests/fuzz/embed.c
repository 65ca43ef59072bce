/* libFuzzer drives Python: `start()` of the module FASTSIG_FUZZ_TARGET gives what is called with each input; what that
 * raises is a finding.
 *
 * Python is embedded, so that the runtime of the sanitizers is there before anything else is loaded (no LD_PRELOAD), and
 * the extension, which is built with -fsanitize=fuzzer-no-link, guides the fuzzer by what of it is reached. */
#include <Python.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static PyObject *run;

static void give_up(const char *what)
{
    if (PyErr_Occurred()) PyErr_Print();
    fprintf(stderr, "fastsig: %s\n", what);
    abort();
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    const char *const target = getenv("FASTSIG_FUZZ_TARGET");
    Py_InitializeEx(0); /* SIGINT stays the fuzzer's */
    PyObject *const module = PyImport_ImportModule(target ? target : "FASTSIG_FUZZ_TARGET is not set");
    run = module ? PyObject_CallMethod(module, "start", NULL) : NULL;
    if (!run) give_up("the target cannot be imported");
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    PyObject *const script = PyBytes_FromStringAndSize((const char *)data, (Py_ssize_t)n);
    PyObject *const result = script ? PyObject_CallOneArg(run, script) : NULL;
    if (!result) give_up("a finding: the traceback is above");
    Py_DECREF(result);
    Py_DECREF(script);
    return 0;
}
