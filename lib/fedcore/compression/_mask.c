/* The shuffle of mask.py, which says what it is for. Each step needs the one before, so it is C or it is slow.
 *
 * Built against the limited API: one file for every CPython from 3.11 on. Needs nothing but Python.h.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <float.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "this machine computes doubles with more digits than they have: mask.py does without this file"
#endif

enum { MULTIPLIER = 48271, MODULUS = 2147483647 };

/* One step of the generator: a product that wraps at 32 bits with its sign, and the remainder, truncated. */
static int32_t step(int32_t state)
{
    return (int32_t)((uint32_t)state * (uint32_t)MULTIPLIER) % MODULUS;
}

static void shuffle(unsigned char *marks, int64_t size, int64_t kept, int32_t seed)
{
    memset(marks, 1, (size_t)kept);
    memset(marks + kept, 0, (size_t)(size - kept));
    int32_t state = step((int32_t)((uint32_t)seed + (uint32_t)MODULUS));
    for (int64_t i = 0; i < size; i++) {
        double chance = (double)state / 4294967294.0 + 0.5;
        int64_t other = (int64_t)(chance * (double)(size - i)) + i;
        unsigned char mark = marks[i];
        marks[i] = marks[other];
        marks[other] = mark;
        state = step(state);
    }
}

static PyObject *fill(PyObject *module, PyObject *arguments)
{
    Py_buffer marks;
    long long kept;
    int seed;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "w*Li", &marks, &kept, &seed))
        return NULL;
    if (kept < 0 || kept > marks.len || marks.len > INT32_MAX) {
        PyBuffer_Release(&marks);
        PyErr_SetString(PyExc_ValueError, "a mask has at most 2**31 - 1 elements, and keeps 0 to all of them");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    shuffle(marks.buf, marks.len, kept, seed);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&marks);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"fill", fill, METH_VARARGS, "fill(marks, kept, seed): write the mask over a buffer of bytes; lets go of the GIL."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_mask", "The shuffle of fedcore.compression.mask.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__mask(void)
{
    return PyModuleDef_Init(&definition);
}
