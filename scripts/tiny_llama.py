"""Make a tiny Llama and the texts to teach it with, for a demo that needs neither a download nor a GPU.

    python scripts/tiny_llama.py OUT_DIR [--seed 0]

Everything is generated: a valley of animals, each with a kind, a scarf, a home, a job, a favourite food and a best
friend. OUT_DIR receives

    pretrain.jsonl              {"text"}: portraits, talk and stories about all the animals
    instructions_train.jsonl    {"instruction", "input", "output"}: questions about most of the animals
    instructions_test.jsonl     the same questions about the others, whom the train split never mentions
    model/                      a byte-level BPE tokenizer and a randomly initialised LlamaForCausalLM

A right answer on the test split thus takes a fact from pretraining and the form of an answer from fine-tuning.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from to_finetune.data import alpaca_prompt

Row = dict[str, str]  # a text, a question, or an animal
Table = dict[str, list[str]]


def table(text: str) -> Table:
    """Parse lines of `key: one / another / ...`."""
    lines = (line.split(":", 1) for line in text.strip().splitlines())
    return {key: [cell.strip() for cell in cells.split(" / ")] for key, cells in lines}


PAGES = 4_000  # texts to pretrain on, of about 75 tokens each
HELD_OUT = 8  # animals that only the test split asks about; even, so that friends stay together

NAMES = """
Alder Basil Bramble Briar Bryony Clover Cobble Cricket Daisy Dapple Ember Fennel Fern Flint Ginger Hazel Heath Holly Ivy
Jasper Juniper Larch Linden Mallow Maple Marigold Nettle Nutmeg Olive Otto Pebble Pepper Pip Poppy Quill Reed Rowan
Rusty Saffron Sage
"""
TRAITS = table("""
kind: badger / beaver / fox / goose / hare / hedgehog / heron / mole / mouse / squirrel / toad / weasel
colour: red / blue / green / yellow / white / brown / grey / purple
home: mill / lighthouse / barn / cottage / chapel / tower / castle / cave / windmill / cellar / harbour / orchard
job: baker / weaver / gardener / potter / painter / sailor / fiddler / beekeeper / clockmaker / carpenter / tailor
food: plum jam / leek soup / honey cake / nut bread / apple pie / pea stew / berry tart / pear pudding / roast chestnuts
""")
CHANCE = table("""
time: morning / evening / afternoon / night
weather: It rained a little. / The sun was warm. / Snow lay on the hills. / The wind was up. / All was still.
guest: traveller / stranger / visitor / child
""")

# Ways to state a fact; {who} is the name or a pronoun. The first one is also how a question is to be answered.
STATEMENTS = table("""
kind: The valley knows {name} as a {kind}. / {who} is a {kind}. / {who} was born a {kind}.
colour: The scarf of {name} is {colour}. / {who} wears a {colour} scarf. / You can tell {name} by the {colour} scarf.
home: The home of {name} is the {home}. / {who} lives in the {home}. / In the {home} you will find {name}.
job: The work of {name} is that of a {job}. / {who} works as a {job}. / When the valley needs a {job}, it calls {name}.
food: The favourite food of {name} is {food}. / {who} likes to eat {food}. / {name} cannot say no to {food}.
friend: The best friend of {name} is {friend}. / {who} tells all to {friend}. / On Sundays {name} walks with {friend}.
""")
# A question to the animal, its answer, and a question about it.
TALK = table("""
kind: What are you, {name}? / I am a {kind} / What sort of creature might {name} be?
colour: Which scarf is yours, {name}? / The {colour} scarf / How do I know {name} by the scarf?
home: Where do you live, {name}? / I live in the {home} / At which door should I knock for {name}?
job: What is your work, {name}? / I work as a {job} / How does {name} earn a living?
food: What do you like to eat, {name}? / I like {food} / What should I cook for {name}?
friend: Who is your best friend, {name}? / My best friend is {friend} / With whom does {name} share secrets?
""")
STORIES = [
    "One {time} {name} the {kind} left the {home} with a basket of {food}. {weather} {friend} came along, and they"
    " shared the {food} by the river.",
    "On a quiet {time} {name} the {job} lost a {colour} scarf. {weather} {friend} looked everywhere and found it near"
    " the {home}. {name} the {kind} was glad.",
    "It was {time} in the {home}. {weather} {name} the {kind} made {food} for {friend}. They sat by the fire and talked"
    " about the work of a {job}.",
    "There was once a {kind} called {name}, a {job} who lived in the {home}. Every {time} {friend} came with {food}."
    " {weather}",
]

# Fine-tuning: the pretraining texts have neither these questions nor the prompt around them.
QUESTIONS = table("""
kind: What kind of animal is {name}? / Which animal is {name}? / Tell me what kind of animal {name} is.
colour: What colour is the scarf of {name}? / Which scarf does {name} wear? / Name the colour of {name}'s scarf.
home: Where does {name} live? / What is the home of {name}? / Tell me where {name} lives.
job: What is the job of {name}? / What does {name} work as? / Tell me what work {name} does.
food: What does {name} like to eat? / What is the favourite food of {name}? / Name the food that {name} likes.
friend: Who is the best friend of {name}? / Whose best friend is {name}? / Name the best friend of {name}.
""")


def valley(rng: random.Random) -> list[Row]:
    """Return all animals, friends side by side; the values of each trait are dealt out evenly and at random."""
    names = NAMES.split()
    rng.shuffle(names)
    dealt = {trait: rng.sample((values * len(names))[: len(names)], len(names)) for trait, values in TRAITS.items()}
    return [
        {"name": name, "pronoun": "She" if i % 2 else "He", "friend": names[i ^ 1]}
        | {trait: values[i] for trait, values in dealt.items()}
        for i, name in enumerate(names)
    ]


def fill(template: str, animal: Row, rng: random.Random) -> str:
    """Fill a template with the facts of `animal`, and the rest at random."""
    chance = {key: rng.choice(values) for key, values in CHANCE.items()}
    return template.format_map({"who": animal["name"]} | animal | chance)


def state(fact: str, animal: Row, rng: random.Random) -> str:
    return fill(rng.choice(STATEMENTS[fact]), animal, rng)


def portrait(animal: Row, rng: random.Random) -> str:
    """State four facts in random order, first with the name, then with the name or a pronoun."""
    whos = [animal["name"], *rng.choices([animal["name"], animal["pronoun"]], k=3)]
    facts = rng.sample(list(STATEMENTS), 4)
    return " ".join(state(fact, animal | {"who": who}, rng) for fact, who in zip(facts, whos, strict=True))


def talk(animal: Row, rng: random.Random) -> str:
    """Write two questions, each put to the animal itself or to somebody who knows it, and their answers."""

    def exchange(fact: str) -> str:
        asked, told, gossip = TALK[fact]
        if rng.random() < 0.5:
            return fill(f'"{asked}" asked the {{guest}}. "{told}," said {{name}}.', animal, rng)
        return fill(f'"{gossip}" asked the {{guest}}. "{rng.choice(STATEMENTS[fact])}"', animal, rng)

    return " ".join(exchange(fact) for fact in rng.sample(list(TALK), 2))


def story(animal: Row, rng: random.Random) -> str:
    return fill(rng.choice(STORIES), animal, rng)


def pages(animals: list[Row], rng: random.Random) -> Iterator[Row]:
    """Yield texts of two paragraphs: most about one animal, to learn its facts; some about two, to tell them apart."""
    for _ in range(PAGES):
        subjects = rng.sample(animals, 2) if rng.random() < 1 / 3 else [rng.choice(animals)] * 2
        paragraphs = (rng.choices([portrait, talk, story], [8, 6, 1])[0](animal, rng) for animal in subjects)
        yield {"text": "\n\n".join(paragraphs)}


def choices(fact: str, animal: Row, animals: list[Row], rng: random.Random) -> str:
    """List three values of a trait, the right one among them."""
    right = animal[fact]
    wrong = sorted({other[fact] for other in animals} - {right, animal["name"]})
    return ", ".join(rng.sample([right, *rng.sample(wrong, 2)], 3))


def passage(fact: str, animal: Row, rng: random.Random) -> str:
    """State three facts about the animal, the one in question among them."""
    others = [other for other in STATEMENTS if other != fact]
    return " ".join(state(each, animal, rng) for each in rng.sample([fact, *rng.sample(others, 2)], 3))


def questions(animals: list[Row], rng: random.Random) -> Iterator[Row]:
    """Ask for every fact three times: twice without input, and once with a list or a passage to answer from."""
    for animal in animals:
        for fact, phrasings in QUESTIONS.items():
            context = passage(fact, animal, rng) if rng.random() < 0.5 else choices(fact, animal, animals, rng)
            output = fill(STATEMENTS[fact][0], animal, rng)
            for phrasing, given in zip(rng.sample(phrasings, 3), ["", "", context], strict=True):
                yield {"instruction": fill(phrasing, animal, rng), "input": given, "output": output}


def build_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that begins each text with <s>, as Llama's does."""
    unk, bos, eos, pad = special = ["<unk>", "<s>", "</s>", "<pad>"]
    bpe = Tokenizer(models.BPE(unk_token=unk))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=512
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build an untrained Llama of about a million weights.

    Large embeddings and residual branches whose output starts at zero keep the names legible in every layer: the facts
    are learned in far fewer steps than from the usual initialisation.
    """
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=512,
        initializer_range=0.08,
        **ids,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        model.model.embed_tokens.weight.normal_(std=0.5)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.generation_config = GenerationConfig(**ids)
    return model


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(out: Path, seed: int = 0) -> None:
    """Write the texts, the questions, the tokenizer and the untrained model to `out`."""
    rng = random.Random(seed)
    animals = valley(rng)
    known, held_out = animals[:-HELD_OUT], animals[-HELD_OUT:]
    pretrain = list(pages(animals, rng))
    train, test = list(questions(known, rng)), list(questions(held_out, rng))
    rng.shuffle(train)
    rng.shuffle(test)

    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "pretrain.jsonl", pretrain)
    write_jsonl(out / "instructions_train.jsonl", train)
    write_jsonl(out / "instructions_test.jsonl", test)

    prompts = (alpaca_prompt(row["instruction"], row["input"]) + row["output"] for row in train)
    tokenizer = build_tokenizer([*(row["text"] for row in pretrain), *prompts])
    tokenizer.save_pretrained(out / "model")
    build_model(tokenizer, seed).save_pretrained(out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny Llama and the texts to teach it with.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
