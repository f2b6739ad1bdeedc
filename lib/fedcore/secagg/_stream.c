/* The addition of masks.py, which says what is added: one pass over the floats in place of three.
 *
 * Built against the limited API: one file for every CPython from 3.11 on. Needs nothing but Python.h. The loops are
 * written for the compiler to make vectors of them. A multiplication that it fuses with the addition changes nothing:
 * the product, with a power of two, is exact.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <float.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "this machine computes floats with more digits than they have: masks.py does without this file"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "this machine has other words than a stream: masks.py does without this file"
#endif

/* Doubles gain a fifth from wider vectors; which there are is known when the file is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_MACHINE __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_MACHINE
#endif

FOR_EACH_MACHINE
static void add_to_singles(float *restrict into, const int32_t *restrict words, Py_ssize_t count, float scale)
{
    for (Py_ssize_t i = 0; i < count; i++)
        into[i] += (float)words[i] * scale;
}

FOR_EACH_MACHINE
static void add_to_doubles(double *restrict into, const int32_t *restrict words, Py_ssize_t count, float scale)
{
    for (Py_ssize_t i = 0; i < count; i++)
        into[i] += (double)((float)words[i] * scale);
}

static int is_of(const Py_buffer *buffer, const char *format, size_t size)
{
    return buffer->format != NULL && strcmp(buffer->format, format) == 0 && (uintptr_t)buffer->buf % size == 0;
}

static PyObject *add_into(const Py_buffer *into, const Py_buffer *words, int sign)
{
    int singles = is_of(into, "f", sizeof(float));
    if (!singles && !is_of(into, "d", sizeof(double))) {
        PyErr_SetString(PyExc_TypeError, "a stream is added to float32 or float64");
        return NULL;
    }
    Py_ssize_t count = into->len / into->itemsize;
    if (words->len / (Py_ssize_t)sizeof(int32_t) < count || (uintptr_t)words->buf % sizeof(int32_t) != 0) {
        PyErr_SetString(PyExc_ValueError, "a stream has a word of four bytes, in its place, for each float");
        return NULL;
    }
    float scale = sign < 0 ? -0x1p-31f : 0x1p-31f;
    Py_BEGIN_ALLOW_THREADS
    if (singles)
        add_to_singles(into->buf, words->buf, count, scale);
    else
        add_to_doubles(into->buf, words->buf, count, scale);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *add(PyObject *module, PyObject *arguments)
{
    PyObject *floats;
    Py_buffer into, words;
    int sign;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "Oy*i", &floats, &words, &sign))
        return NULL;
    PyObject *done = NULL;
    if (PyObject_GetBuffer(floats, &into, PyBUF_WRITABLE | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) == 0) {
        done = add_into(&into, &words, sign);
        PyBuffer_Release(&into);
    }
    PyBuffer_Release(&words);
    return done;
}

static PyMethodDef methods[] = {
    {"add", add, METH_VARARGS, "add(into, stream, sign): add a piece of a stream to floats; lets go of the GIL."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_stream", "The addition of fedcore.secagg.masks.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__stream(void)
{
    return PyModuleDef_Init(&definition);
}
