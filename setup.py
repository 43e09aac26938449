from setuptools import setup

setup(
    packages=["ttt4as_fast", "ttt4as_fast.integrations"]
    + ["ttt4as_fast.kernels" + name for name in ("", ".bilinear", ".knn", ".coreset", ".peaks", ".linear_svm", ".segment")],
    package_dir={"ttt4as_fast": "ttt4as_fast", "ttt4as_fast.kernels": "kernels"},
)
