"""Every published way of making a Mixture-of-Experts from a dense Llama: methods.py, name -> module.

    copy  half  drop  virtual  mix                        experts as wide as the dense layer, or shards of copies
    random  clustering  gradient  llama_moe_v2            the dense neurons partitioned
    sharing_inner  sharing_inter  residual                neurons chosen by importance, shared between experts

A module has `child(parent, options)`, the Model of the result; `build(layer, dense, options, ...)`, the experts of one
layer; and `preserves(options)`, what theory says of the result. SCORED methods take importance scores [E, F] as a
fourth argument (`importance.py`; llama_moe_v2 optionally), `mix` the other dense layers. `attention.py` splits
attention and goes with any of them. Routers come from `routers.py` and `prompts.py`, `transplant.py` puts the parts
into a model and `receipt.py` compares it with its parent. Tensors keep their dtype; what is drawn depends on (seed,
layer, expert).

The work, which tools/upcycle.py runs: `flags.py` (what may be asked for), `text.py` (what is read), `observe.py`
(router rows and importances, by the dense model of `decoder.py`), `source.py` (the child as a source of weights),
`result.py` (what is written, and its receipt).
"""
