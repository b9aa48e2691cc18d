"""The calls to the CUDA driver that HistoStream needs, over cuda-python or PyCUDA."""
