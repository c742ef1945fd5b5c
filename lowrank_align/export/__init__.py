"""What was trained, for other programs: one folder an export, checked against the base and the adapter it came from.

`source` is what is exported, `folder` where to, `merge` the weights, `verify` the files read back against base and
adapter, `companions` what lies beside weights, `ollama`, `gotemplate` and `gguf` the other formats, `card` the README.
"""
