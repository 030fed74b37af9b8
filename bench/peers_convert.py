"""A checkpoint as GGUF, by llama.cpp's own converter, without a vocabulary: ids are fed, so none is needed.

python bench/peers_convert.py LLAMA_CPP_SOURCE CHECKPOINT OUT.gguf [further options of convert_hf_to_gguf.py]
"""

import sys


def main() -> None:
    source, checkpoint, out = sys.argv[1:4]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    import convert_hf_to_gguf
    from conversion import TextModel
    from conversion.qwen import Qwen3MoeModel

    def no_vocabulary(model) -> None:
        model._set_vocab_none()
        model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])

    TextModel.set_vocab = Qwen3MoeModel.set_vocab = no_vocabulary
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", out, *sys.argv[4:]]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
