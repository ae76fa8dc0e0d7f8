"""Code generators: IR in, something that runs out. One package per backend, imported only when used."""
