/* An extension module as a scientist would have: numbers in a loop, and progress by printf(3). */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdio.h>

static PyObject *energy(PyObject *self, PyObject *arguments)
{
    const char *name;
    Py_buffer samples;
    double sum = 0;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "sy*", &name, &samples))
        return NULL;
    const double *values = samples.buf;
    Py_ssize_t count = samples.len / (Py_ssize_t)sizeof(double);
    for (Py_ssize_t i = 0; i + 1 < count; i += 2)
        sum += (values[i] - values[i + 1]) * (values[i] - values[i + 1]) / 2;
    PyBuffer_Release(&samples);
    printf("wavelet: %s: %.6f\n", name, sqrt(sum));
    return PyFloat_FromDouble(sqrt(sum));
}

static PyMethodDef methods[] = {{"energy", energy, METH_VARARGS, "Detail energy of float64 samples (Haar)."}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "wavelet", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_wavelet(void)
{
    return PyModule_Create(&module);
}
