"""What test-time training costs, against whom, and whether a change made it worse: the benchmark suite.

Installed as ``ttt4as_fast.benchmarks``, where the command ``ttt4as bench`` finds it; what needs a GPU or data of one's
own runs from a checkout: ``python -m benchmarks.gpu``, ``python -m benchmarks.presets``. `workloads` says on what,
`peers` against whom, `gate` when a number may be printed, `measure` how time and memory are taken, `machine` where; the
other files each ask one question. Nothing here is needed to use the package.
"""
