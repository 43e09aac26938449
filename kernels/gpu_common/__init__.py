"""What the ``gpu.py`` files share: capability tests, the launcher of CUDA C++ kernels, interpolation tables, chunking.

Triton kernels live beside the operation that owns them. CUDA C++ (``*.cu``, ``*.cuh``) is written once, for three
compilers: CuPy hands it to NVRTC at run time, ``nvcc`` can build it ahead of time, and a C++ compiler builds it for the
host, where the tests run it thread by thread. Nothing here imports torch, triton or cupy before it is needed.
"""

FUSED = {"enable_fp_fusion": True}
"""Options of every Triton launch: a multiplication and an addition are one operation, as bounds and measurements have
it. Triton 3.9 warns where it is left to its default, which it means to turn around.
"""
