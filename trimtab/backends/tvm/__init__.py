"""The TVM backend: IR to Relax and TIR to a shared library. Importing this package does not import tvm."""
