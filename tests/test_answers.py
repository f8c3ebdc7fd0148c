"""Answers about images, by models that transformers' own classes build and save."""

from __future__ import annotations

import json
import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from sam_infer.errors import InputError
from sam_infer.text.answers import QUESTIONS, LocalAnswerer
from sam_infer.text.encoders import HashedTextEncoder
from sam_infer.text.labeltexts import LabelTexts, TextSettings

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = QUESTIONS["shape_and_place"].replace("{label}", "blob")
WORDS = ["what", "is", "the", "shape", "of", "blob", "and", "where", "it", "located", "?"]
LEFT, RIGHT = np.zeros((2, 40, 48), np.float32)
LEFT[:, :24] = 1
RIGHT[:, 24:] = 1


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a local model asks for nothing on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def picture(image):
    return Image.fromarray((image * 255).astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A folder with a tiny BLIP that has learned to say where the bright half of a picture is."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words += ["square", "left", "round", "right", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), additional_special_tokens=["[DEC]"])
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.1,
    }
    tokens = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**sizes, **tokens, "vocab_size": len(words), "encoder_hidden_size": 32},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    torch.manual_seed(0)
    model = BlipForQuestionAnswering(config).eval()
    inputs = processor(images=[picture(LEFT), picture(RIGHT)], text=[QUESTION] * 2, return_tensors="pt")
    said = torch.tensor([[5, 6, 7, 3], [5, 8, 9, 3]])
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(500):
        loss = model(**inputs, labels=said).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    assert loss < 0.02
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A folder with a tiny image-text model with a chat template, untrained; and model and processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "user", ":", "assistant", *WORDS]
    table = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=table,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    template = (
        "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16),
            text_config=LlamaConfig(
                **sizes, vocab_size=len(words), num_key_value_heads=2, initializer_range=0.5, eos_token_id=3
            ),
            image_token_index=4,
            vision_feature_layer=-1,
        )
    ).eval()
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def test_a_blip_model_answers_about_the_image(blip):
    answerer = LocalAnswerer(blip)
    assert answerer.answer(LEFT, QUESTION) == "square left"
    assert answerer.answer(RIGHT, QUESTION) == "round right"
    assert answerer.answer(np.repeat(RIGHT[..., None], 3, axis=2), QUESTION) == "round right"
    assert LocalAnswerer(blip, max_tokens=1).answer(RIGHT, QUESTION) == "round"


def test_an_answer_is_part_of_a_labels_text(blip, tmp_path):
    settings = TextSettings(answers=blip, descriptions={"blob": "A blob is a blob."})
    texts = LabelTexts(settings, encoder=HashedTextEncoder(), folder=tmp_path)
    assert texts.text("blob", LEFT) == "square left A blob is a blob."
    assert texts.text("blob") == "A blob is a blob."
    assert not np.array_equal(texts.embedding("blob", LEFT), texts.embedding("blob", RIGHT))
    assert texts.record(["blob"])["answerer"] == LocalAnswerer(blip).fingerprint


def test_a_chat_model_is_asked_as_its_template_says(llava):
    folder, model, processor = llava
    inputs = processor(
        images=picture(LEFT),
        text="user : <image> what is the shape of blob ? assistant :",
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected and "assistant :" not in expected
    assert LocalAnswerer(folder, max_tokens=6).answer(LEFT, "what is the shape of blob ?") == expected


def test_pickled_weights_are_read_as_tensors_only(blip, tmp_path):
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(blip, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    answerer = LocalAnswerer(folder)
    assert answerer.answer(LEFT, QUESTION) == "square left"
    assert answerer.fingerprint != LocalAnswerer(blip).fingerprint

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    torch.save({**state, "evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot read it") as raised:
        LocalAnswerer(folder).answer(LEFT, QUESTION)
    assert raised.value.status == 422 and not (tmp_path / "run").exists()


def test_weights_in_half_precision_answer_on_the_cpu(blip, tmp_path):
    from transformers import BlipForQuestionAnswering

    folder = tmp_path / "half"
    shutil.copytree(blip, folder)
    BlipForQuestionAnswering.from_pretrained(blip, dtype=torch.float16).save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size < (blip / "model.safetensors").stat().st_size
    assert LocalAnswerer(folder).answer(RIGHT, QUESTION) == "round right"


def test_the_fingerprint_follows_the_files(blip, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(blip, folder)
    before = LocalAnswerer(folder).fingerprint
    assert before == LocalAnswerer(blip).fingerprint != LocalAnswerer(blip, max_tokens=3).fingerprint
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert LocalAnswerer(folder).fingerprint != before


def test_folders_without_a_model_are_told_so(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        for ask in (lambda one: one.fingerprint, lambda one: one.answer(LEFT, QUESTION)):
            with pytest.raises(InputError, match=r"no config\.json") as raised:
                ask(LocalAnswerer(folder))
            assert raised.value.status == 409


def spoil_config(folder):
    (folder / "config.json").write_text("{")


def spoil_kind(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "vilt", "architectures": ["Vilt"]}))


def spoil_code(folder):
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "architectures": ["Own"], "auto_map": auto})
    )
    (folder / "own.py").write_text("raise AssertionError('code from the folder was run')")


def spoil_weights(folder):
    (folder / "model.safetensors").write_bytes(b"not weights")


def spoil_parameters(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if "text_encoder" not in name}
    assert 0 < len(kept) < len(state)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_processor(folder):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config, r"config\.json cannot be read"),
        (spoil_kind, "cannot read it"),
        (spoil_code, "cannot read it"),
        (spoil_weights, "cannot read it"),
        (spoil_parameters, "weights lack parameters of BlipForQuestionAnswering"),
        (spoil_processor, "cannot read it"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(blip, tmp_path, spoil, message):
    folder = tmp_path / "model"
    shutil.copytree(blip, folder)
    spoil(folder)
    with pytest.raises(InputError, match=message) as raised:
        LocalAnswerer(folder).answer(LEFT, QUESTION)
    assert raised.value.status == 422 and "code from the folder" not in str(raised.value)


def test_a_chat_model_without_a_template_is_refused(llava, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(llava[0], folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="without a chat template"):
        LocalAnswerer(folder).answer(LEFT, QUESTION)


@pytest.mark.parametrize("shape", [(4,), (4, 4, 2), (1, 4, 4, 3)])
def test_images_have_two_axes_or_colours(blip, shape):
    with pytest.raises(ValueError, match="image must have shape"):
        LocalAnswerer(blip).answer(np.zeros(shape, np.float32), QUESTION)
