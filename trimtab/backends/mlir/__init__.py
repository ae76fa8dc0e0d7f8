"""The MLIR backend: IR to structured ops of MLIR, compiled by IREE. Importing this package imports neither."""
