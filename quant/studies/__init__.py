"""Study a quantized Wan transformer: what suffers, which method, what it costs, with intervals.

Each study is a command, `python -m quant analyze|ablate|compare-methods|qat|evaluate|figures`. It
works on points of real trajectories that `record` has kept (`points`), compares with a reference
in float32 whose blocks visit the device one at a time (`block_stream`), goes on after a kill, and
writes a folder of JSON, CSV, PNG and one HTML page (`output`).
"""
