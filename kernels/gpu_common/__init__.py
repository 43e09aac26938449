"""What the ``gpu.py`` files share: capability tests, the launcher of CUDA C++ kernels, graphs, tables, chunks.

Triton kernels live beside the operation that owns them. CUDA C++ (``*.cu``, ``*.cuh``) is written once, for three
compilers: CuPy hands it to NVRTC at run time, ``nvcc`` can build it ahead of time, and a C++ compiler builds it for the
host, where the tests run it thread by thread. Nothing here imports torch, triton or cupy before it is needed.
"""

FUSED = {"enable_fp_fusion": True}
"""Options of every Triton launch: multiply-adds are fused, as error bounds and measurements assume. Triton 3.9 warns
where the option is left to its default, which a later version will change.
"""
