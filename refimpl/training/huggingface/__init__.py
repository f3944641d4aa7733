"""Hugging Face folders: read and write config.json with safetensors files, read GGUF files.

    config_json.py, rope_parameters.py   config.json <-> the name and sizes of a model, and its rotary positions
    files.py                             one safetensors file or shards as arrays, mapped into memory
    gguf.py, gguf_tokenizer.py           GGUF files of the llama architecture, and their tokenizer
    beside.py                            the small files beside the weights, which a run keeps
    kinds.py                             what a path is that is given for weights
    export.py                            folders that transformers loads

Neither torch nor transformers is needed; GGUF files take the package `gguf`.
"""
