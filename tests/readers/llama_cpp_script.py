"""Run by a Python that has llama-cpp-python: read a GGUF file, answer questions about it, as JSON.

Arguments: the file; a JSON file with what is asked: tokens, batches (how many of them at once), texts, turns (pairs of
role and content); where to put the logits (float32, [tokens, vocabulary]).
"""

import ctypes
import json
import sys

import llama_cpp
import numpy


def load(path):
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit("llama.cpp refuses the file")
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 64
    parameters.n_threads = parameters.n_threads_batch = 1
    return model, llama_cpp.llama_init_from_model(model, parameters)


def logits_of(context, tokens, batches, vocab_size):
    rows = []
    start = 0
    for length in batches:
        batch = llama_cpp.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for i in range(length):
            batch.token[i] = tokens[start + i]
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        if llama_cpp.llama_decode(context, batch):
            sys.exit("llama_decode failed")
        for i in range(length):
            row = llama_cpp.llama_get_logits_ith(context, i)
            rows.append(numpy.ctypeslib.as_array(row, shape=(vocab_size,)).copy())
        llama_cpp.llama_batch_free(batch)
        start += length
    return numpy.stack(rows)


def tokens_of(vocab, text):
    data = text.encode()
    ids = (llama_cpp.llama_token * (len(data) + 8))()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, len(ids), False, False)
    return list(ids[:count])


def text_of(vocab, ids):
    pieces = b""
    for token in ids:
        buffer = ctypes.create_string_buffer(512)
        length = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, False)
        pieces += buffer.raw[:length]
    return pieces.hex()


def chat(model, turns):
    template = llama_cpp.llama_model_chat_template(model, None)
    messages = (llama_cpp.llama_chat_message * len(turns))(
        *[llama_cpp.llama_chat_message(role.encode(), content.encode()) for role, content in turns]
    )
    buffer = ctypes.create_string_buffer(4096)
    length = llama_cpp.llama_chat_apply_template(template, messages, len(turns), True, buffer, len(buffer))
    return buffer.raw[:length].decode()


def main():
    model, context = load(sys.argv[1])
    with open(sys.argv[2], encoding="utf-8") as file:
        asked = json.load(file)
    vocab = llama_cpp.llama_model_get_vocab(model)
    vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
    numpy.save(sys.argv[3], logits_of(context, asked["tokens"], asked["batches"], vocab_size))
    answer = {"vocab_size": vocab_size}
    if "texts" in asked:
        ids = [tokens_of(vocab, text) for text in asked["texts"]]
        answer |= {
            "ids": ids,
            "bytes": [text_of(vocab, row) for row in ids],
            "chat": chat(model, asked["turns"]),
            "eos": llama_cpp.llama_vocab_eos(vocab),
            "bos": llama_cpp.llama_vocab_bos(vocab),
            "eot": llama_cpp.llama_vocab_eot(vocab),
            "ends": [i for i in range(vocab_size) if llama_cpp.llama_vocab_is_eog(vocab, i)],
        }
    print(json.dumps(answer))


main()
