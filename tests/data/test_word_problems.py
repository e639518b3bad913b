from trl_entropy.data.word_problems import load_word_problems


def test_x():
    load_word_problems("train", 10)
    from trl_entropy.embedded_model import build_model, build_tokenizer

    build_model(build_tokenizer())
