"""Builds the cffi module; everything else about the package is in setup.cfg."""

from setuptools import setup

setup(cffi_modules=["sfparallel/_native_build.py:ffibuilder"])
