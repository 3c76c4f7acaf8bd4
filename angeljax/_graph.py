"""How a loop of small kernels is compiled for a GPU."""

from __future__ import annotations

# One CUDA graph with the loop and its predicate in it, so that no kernel waits for the
# host: without them XLA launches a graph for each pass and looks at the predicate in
# between. Other backends know these options and have nothing to do with them. They are
# for a program that is not part of another, which JAX refuses.
ONE_GRAPH: dict[str, str | int] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,"
    "CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}
