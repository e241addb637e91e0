use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use models::SpecialToken;

use super::*;
use crate::Chat;
use crate::testing::{like_llama_3, puts, record, tokenizer, written};

const LONG: Limit = Limit {
    max_len: 1000,
    too_long: TooLong::Refuse,
};

struct Model {
    tokenizer: Tokenizer,
    special: SpecialTokens,
    _dir: TempDir,
}

fn model(post_processor: Value) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path(), post_processor);
    let mut special = SpecialTokens::read(dir.path(), &tokenizer).unwrap();
    let text = "</s>".into();
    special.eos = Some(SpecialToken { text, id: 2 });
    Model {
        tokenizer,
        special,
        _dir: dir,
    }
}

impl Model {
    fn encode(&self, template: &Template, fields: &[Value], limit: Limit) -> Result<Encoded> {
        let records: Vec<Record> = fields.iter().cloned().map(record).collect();
        encode(&records, template, &self.tokenizer, &self.special, limit)
    }

    /// The tokens of a prompt and a completion.
    fn written(&self, prompt: &str, completion: &str) -> String {
        let fields = [json!({"p": prompt, "c": completion})];
        let encoded = self.encode(&fields_template(), &fields, LONG).unwrap();
        written(&encoded.examples[0], &self.tokenizer)
    }
}

fn fields_template() -> Template {
    Template::fields("{{ p }}", "{{ c }}").unwrap()
}

#[test]
fn the_completion_and_its_end_are_targets() {
    let plain = model(Value::Null);
    assert_eq!(plain.written("x:", " b"), "x : Ġb* </s>*");
    assert_eq!(plain.written("no", "w a"), "now Ġa* </s>*");
    let with_bos = model(like_llama_3());
    assert_eq!(with_bos.written("x:", " b"), "<s> x : Ġb* </s>*");
    // Also where the tokenizer adds it, `</s>` comes once.
    let with_both = model(puts(&["<s>"], &["</s>"]));
    assert_eq!(with_both.written("x:", " b"), "<s> x : Ġb* </s>*");
}

/// Also where the offsets of the tokenizer exclude the space before a word.
#[test]
fn a_token_belongs_to_the_piece_in_which_it_begins() {
    for model in [model(Value::Null), model(like_llama_3())] {
        let written = |prompt, completion| {
            let written = model.written(prompt, completion);
            written.trim_start_matches("<s> ").to_owned()
        };
        assert_eq!(written("x: ", "b a"), "x : Ġb Ġa* </s>*");
        assert_eq!(written("x:", " b a"), "x : Ġb* Ġa* </s>*");
        assert_eq!(written("n", "ow"), "now </s>*");
    }
}

/// As `char_to_token` of the block's first and last character in transformers.
#[test]
fn a_token_of_which_a_part_is_generated_is_a_target() {
    let source = "{{ messages[0].content }}{% generation %}{{ messages[1].content }}{% endgeneration %}{{ messages[2].content }}";
    let template = Template::Chat(Chat::new(source, &SpecialTokens::default()).unwrap());
    for model in [model(Value::Null), model(like_llama_3())] {
        let written = |texts: [&str; 3]| {
            let messages = texts.map(|text| json!({"role": "user", "content": text}));
            let fields = [json!({"messages": messages})];
            let encoded = model.encode(&template, &fields, LONG).unwrap();
            let written = written(&encoded.examples[0], &model.tokenizer);
            written.trim_start_matches("<s> ").to_owned()
        };
        assert_eq!(written(["x: ", "b a", ":"]), "x : Ġb* Ġa* :");
        assert_eq!(written([":n", "ow", " x"]), ": now* Ġx");
        assert_eq!(written([":n", "o", "w"]), ": now*");
        assert_eq!(written([":語", "語a", "語"]), ": è ª ŀ è* ª* ŀ* a* è ª ŀ");
    }
}

#[test]
fn offsets_are_in_bytes() {
    let model = model(Value::Null);
    assert_eq!(model.written("éa", "éb"), "Ã© a Ã©* b* </s>*");
    assert_eq!(model.written("語a", "語b"), "è ª ŀ a è* ª* ŀ* b* </s>*");
}

/// All their tokens are targets, also beside empty pieces.
#[test]
fn target_pieces_may_be_adjacent() {
    let model = model(like_llama_3());
    let encoder = Encoder::new(&fields_template(), &model.tokenizer, &model.special).unwrap();
    let pieces = [
        ("x", true),
        ("", true),
        (" b", true),
        ("", false),
        (" a", true),
        (":", false),
    ];
    let pieces = pieces.map(|(text, is_target)| {
        let text = text.into();
        Piece { text, is_target }
    });
    let example = encoder.encode(&pieces).unwrap();
    assert_eq!(
        written(&example, &model.tokenizer),
        "<s> x* Ġb* Ġa* : </s>*"
    );
}

#[test]
fn the_first_token_is_never_a_target() {
    assert_eq!(model(Value::Null).written("", "x b"), "x Ġb* </s>*");
    assert_eq!(model(like_llama_3()).written("", "x b"), "<s> x* Ġb* </s>*");
}

const CHATML: &str = "{% for m in messages %}{{'<|im_start|>' + m.role[0] + ':' + m.content + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>a:' }}{% endif %}";

/// Special tokens of the template are encoded as such, and none is added.
#[test]
fn a_chat_has_its_own_special_tokens() {
    let model = model(like_llama_3());
    let template = Template::Chat(Chat::new(CHATML, &model.special).unwrap());
    let user = json!({"role": "user", "content": "x"});
    let assistant = json!({"role": "assistant", "content": "now b"});
    let fields = json!({"messages": [user, assistant, user, assistant]});
    let encoded = model.encode(&template, &[fields], LONG).unwrap();
    assert_eq!(
        written(&encoded.examples[0], &model.tokenizer),
        "<|im_start|> u : x <|im_end|> Ċ <|im_start|> a : now* Ġb* <|im_end|>* Ċ* \
         <|im_start|> u : x <|im_end|> Ċ <|im_start|> a : now* Ġb* <|im_end|>* Ċ*"
    );
}

/// Of 3, 5, 7 and 3 tokens; the last but one has a prompt of 5.
fn four() -> [Value; 4] {
    [
        ("x", " b"),
        ("x", " b b b"),
        ("x b b b b", " b"),
        ("x", " a"),
    ]
    .map(|(prompt, completion)| json!({"p": prompt, "c": completion}))
}

#[test]
fn long_texts_are_cut() {
    let model = model(Value::Null);
    let limit = Limit {
        max_len: 4,
        too_long: TooLong::Cut,
    };
    let encoded = model.encode(&fields_template(), &four(), limit).unwrap();
    let examples = encoded
        .examples
        .iter()
        .map(|example| written(example, &model.tokenizer));
    let expected = ["x Ġb* </s>*", "x Ġb* Ġb* Ġb*", "x Ġa* </s>*"];
    assert_eq!(examples.collect::<Vec<_>>(), expected);
    assert_eq!(
        encoded.to_string(),
        "3 examples, 10 tokens, 7 of them targets; 1 cut to 4 tokens; left out: 0 too long, 1 without targets"
    );
}

#[test]
fn long_texts_are_dropped() {
    let limit = Limit {
        max_len: 4,
        too_long: TooLong::Drop,
    };
    let encoded = model(Value::Null)
        .encode(&fields_template(), &four(), limit)
        .unwrap();
    let counts = (encoded.n_cut, encoded.n_dropped, encoded.n_without_targets);
    assert_eq!((encoded.examples.len(), counts), (2, (0, 2, 0)));
    let all = Limit {
        max_len: 7,
        too_long: TooLong::Refuse,
    };
    assert_eq!(
        model(Value::Null)
            .encode(&fields_template(), &four(), all)
            .unwrap()
            .examples
            .len(),
        4
    );
}

#[test]
fn long_texts_are_refused() {
    let limit = Limit {
        max_len: 4,
        too_long: TooLong::Refuse,
    };
    let error = model(Value::Null)
        .encode(&fields_template(), &four(), limit)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "`data.jsonl`, line 7: 5 tokens, more than the limit of 4; drop or cut such records, or raise the limit"
    );
}

#[test]
fn records_without_examples_are_refused() {
    let model = model(Value::Null);
    for (max_len, too_long, dropped, without) in [
        (1, TooLong::Cut, 0, 4),
        (2, TooLong::Drop, 4, 0),
        (0, TooLong::Cut, 0, 4),
    ] {
        let limit = Limit { max_len, too_long };
        let error = model
            .encode(&fields_template(), &four(), limit)
            .unwrap_err();
        assert!(
            matches!(error, Error::NoExamples { n_records: 4, n_too_long, n_without_targets, .. }
            if (n_too_long, n_without_targets) == (dropped, without)),
            "{error}"
        );
    }
    let chat = Template::Chat(Chat::new(CHATML, &model.special).unwrap());
    let silent = json!({"messages": [{"role": "user", "content": "x"}]});
    let error = model.encode(&chat, &[silent], LONG).unwrap_err();
    assert!(matches!(
        error,
        Error::NoExamples {
            n_without_targets: 1,
            ..
        }
    ));
}

#[test]
fn a_text_needs_an_end() {
    let mut model = model(Value::Null);
    model.special.eos = None;
    let error = model.encode(&fields_template(), &four(), LONG).unwrap_err();
    assert!(matches!(
        error,
        Error::Model(models::Error::Text(models::TextError::MissingSpecial {
            name: "eos_token",
            ..
        }))
    ));
    // A chat has its own.
    let chat = Template::Chat(Chat::new(CHATML, &model.special).unwrap());
    let fields = json!({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}]});
    assert!(model.encode(&chat, &[fields], LONG).is_ok());
}

#[test]
fn duplicates_are_counted() {
    let example = |tokens: &[u32]| Example::new(tokens.to_vec(), vec![true; tokens.len()]);
    let train = [
        example(&[1, 2]),
        example(&[1, 3]),
        example(&[1, 2]),
        example(&[1]),
    ];
    let eval = [example(&[1, 2]), example(&[2, 1]), example(&[1])];
    assert_eq!(count_duplicates(&train, &eval), 2);
    assert_eq!(count_duplicates(&eval, &train), 3);
    assert_eq!(count_duplicates(&train, &[]), 0);
}

proptest! {
    /// The tokens are those of the whole text, and the first byte of a token decides whether it is a target.
    #[test]
    fn tokens_are_those_of_the_text(prompt in "[ab x\né語]{0,12}", completion in "[ab x\né語]{0,12}") {
        let model = model(Value::Null);
        let text = prompt.clone() + &completion;
        let encoder = Encoder::new(&fields_template(), &model.tokenizer, &model.special).unwrap();
        let piece = |text, is_target| Piece { text, is_target };
        let example = encoder.encode(&[piece(prompt.clone(), false), piece(completion, true)]).unwrap();
        let (end, tokens) = example.tokens().split_last().unwrap();
        prop_assert_eq!(*end, 2);
        let n_bytes = tokens.iter().map(|&token| {
            let letters = model.tokenizer.id_to_token(token).unwrap();
            letters.chars().count()
        });
        let starts = n_bytes.scan(0, |at, n| {
            let start = *at;
            *at += n;
            Some(start)
        });
        // A token has one letter for each byte: where it begins follows from those before it.
        let starts: Vec<usize> = starts.collect();
        for (at, &start) in starts.iter().enumerate() {
            let character = (0..=start).rev().find(|&byte| text.is_char_boundary(byte)).unwrap();
            prop_assert_eq!(example.is_target()[at], at > 0 && character >= prompt.len());
        }
    }
}
