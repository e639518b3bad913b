"""A tiny model that sees: LLaVA with a CLIP tower, made in code, with a processor for images of 16 x 16 pixels."""

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Qwen2Config

from trl_entropy.models.embedded import build_tokenizer

IMAGE = "<image>"
CHAT = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}\nResponse:{% endif %}"
)


def build_processor() -> LlavaProcessor:
    from transformers.models.clip import CLIPImageProcessorPil

    tokenizer = build_tokenizer()
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=True)
    return LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=CHAT,
        image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip


def build_vlm(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    tokenizer = processor.tokenizer
    text = Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image_token = tokenizer.convert_tokens_to_ids(IMAGE)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, dtype="float32")
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, 0
    return model


def picture(number: int) -> Image.Image:
    """A picture of one colour, another for each number."""
    return Image.new("RGB", (16, 16), ((number * 67) % 256, (number * 131) % 256, (number * 29) % 256))
