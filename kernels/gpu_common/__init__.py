"""What the ``gpu.py`` files share: capability tests, the launcher of CUDA C++ kernels, interpolation tables, chunking.

Triton kernels live beside the operation that owns them. CUDA C++ (``*.cu``, ``*.cuh``) is written once, for three
compilers: CuPy hands it to NVRTC at run time, ``nvcc`` can build it ahead of time, and a C++ compiler builds it for the
host, where the tests run it thread by thread. Nothing here imports torch, triton or cupy before it is needed.
"""
