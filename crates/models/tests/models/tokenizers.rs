//! Tokenizers of directories without a `tokenizer.json` against transformers, and text from tokens.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use models::{ConfigError, Error, Generation, Pretrained, SpecialTokens, TextError, Tokenizer};
use peft::Linears;
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

use super::fixtures::{self, cases, pretrained};

#[path = "../fixtures/scripted.rs"]
mod scripted;

use scripted::write_scripted;

#[derive(Deserialize)]
struct Reference {
    n_tokens: usize,
    special: BTreeMap<String, Option<String>>,
    encoded: Vec<Encoded>,
    decoded: Vec<Decoded>,
}

#[derive(Deserialize)]
struct Encoded {
    text: String,
    tokens: Vec<u32>,
    with_special: Vec<u32>,
    decoded: String,
}

#[derive(Deserialize)]
struct Decoded {
    tokens: Vec<u32>,
    text: String,
    with_special: String,
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers")
}

const NAMES: [&str; 13] = [
    "llama",
    "llama_legacy",
    "llama_unstated",
    "mistral",
    "normalized",
    "unigram",
    "unigram_plain",
    "gpt2",
    "gpt2_prefix",
    "opt",
    "qwen2",
    "llama3",
    "deepseek",
];

fn read(dir: &Path) -> Tokenizer {
    let found = Tokenizer::read(dir).unwrap_or_else(|error| panic!("{dir:?}: {error}"));
    found.expect("a tokenizer")
}

/// A copy of one of the directories, to be changed.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden().join(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

#[test]
fn vocabularies_give_the_tokens_and_texts_of_transformers() {
    for name in NAMES {
        let dir = golden().join(name);
        let tokenizer = read(&dir);
        let reference = fs::read(dir.join("reference.json")).unwrap();
        let reference: Reference = serde_json::from_slice(&reference).unwrap();
        let last = reference.n_tokens as u32 - 1;
        assert!(tokenizer.id_to_token(last).is_some(), "{name}");
        assert_eq!(tokenizer.id_to_token(last + 1), None, "{name}");
        let special = SpecialTokens::read(&dir, &tokenizer).unwrap();
        for (named, token) in special.named() {
            let found = token.map(|token| token.text.clone());
            assert_eq!(found, reference.special[named], "{name}: {named}");
        }
        let bos = special.bos.filter(|_| special.add_bos).map(|bos| bos.id);
        for case in &reference.encoded {
            let text = &case.text;
            let tokens = tokenizer.encode(text).unwrap();
            assert_eq!(tokens, case.tokens, "{name}: {text:?}");
            let with_bos: Vec<u32> = bos.into_iter().chain(tokens.clone()).collect();
            assert!(case.with_special.starts_with(&with_bos), "{name}: {text:?}");
            assert!(
                case.with_special.len() <= with_bos.len() + 1,
                "{name}: {text:?}"
            );
            let decoded = tokenizer.decode(&tokens).unwrap();
            assert_eq!(decoded, case.decoded, "{name}: {text:?}");
        }
        for case in &reference.decoded {
            let tokens = &case.tokens;
            let text = tokenizer.decode(tokens).unwrap();
            assert_eq!(text, case.text, "{name}: {tokens:?}");
            let text = tokenizer.decode_with_special(tokens).unwrap();
            assert_eq!(text, case.with_special, "{name}: {tokens:?}");
        }
    }
}

/// The text of all tokens less that of the first ones.
fn less<'a>(all: &'a str, context: &str) -> &'a str {
    if let Some(rest) = all.strip_prefix(context) {
        return rest;
    }
    let same = |((_, a), b): &((usize, char), char)| a == b;
    let same = all.char_indices().zip(context.chars()).take_while(same);
    let n_bytes: usize = same.map(|((_, a), _)| a.len_utf8()).sum();
    &all[n_bytes..]
}

/// The pieces of a stream, each of which must begin what is left of the text.
fn check_stream(
    tokenizer: &Tokenizer,
    tokens: &[u32],
    n_context: usize,
) -> Result<(), TestCaseError> {
    let (context, new) = tokens.split_at(n_context);
    let (all, before) = (tokenizer.decode(tokens), tokenizer.decode(context));
    let (all, before) = (all.unwrap(), before.unwrap());
    let mut rest = less(&all, &before);
    let mut stream = tokenizer.stream(context).unwrap();
    for (at, &token) in new.iter().enumerate() {
        let piece = stream.push(token).unwrap();
        // The text up to here, if no more tokens follow.
        let shown = less(&all, &before).len() - rest.len() + piece.len();
        let left = rest.strip_prefix(piece.as_str());
        prop_assert!(
            left.is_some(),
            "{piece:?} of {rest:?} after {:?}",
            &new[..=at]
        );
        let so_far = tokenizer.decode(&tokens[..=n_context + at]).unwrap();
        prop_assert!(shown <= so_far.len());
        rest = left.unwrap();
    }
    prop_assert_eq!(stream.finish().unwrap(), rest);
    Ok(())
}

/// A tokenizer whose decoder is none of the usual ones.
fn with_decoder(decoder: &Value) -> Tokenizer {
    let words = [
        "a", "b", "##c", "<0xE2>", "<0x82>", "<0xAC>", "▁d", "▁", "e</w>", "b b", ".", "!", "'",
        "\u{fffd}", "<0x41>", " ", "n't",
    ];
    let vocab: serde_json::Map<String, Value> = words
        .iter()
        .zip(0..)
        .map(|(word, id)| (word.to_string(), Value::from(id)))
        .collect();
    let json = json!({"added_tokens": [{"id": 3, "content": "<0xE2>", "special": false, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false},
        {"id": 17, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false}],
        "decoder": decoder, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}});
    Tokenizer::from_bytes(json.to_string().as_bytes(), Path::new("tokenizer.json")).unwrap()
}

fn decoders() -> Vec<Value> {
    let replace = |pattern: &str, content: &str| json!({"type": "Replace", "pattern": {"String": pattern}, "content": content});
    let sequence = |decoders: &[Value]| json!({"type": "Sequence", "decoders": decoders});
    let (fallback, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"});
    let word_piece = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    vec![
        Value::Null,
        word_piece.clone(),
        metaspace.clone(),
        byte_level.clone(),
        json!({"type": "BPEDecoder", "suffix": "</w>"}),
        json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "▁", "cleanup": true}),
        sequence(&[
            replace("▁", " "),
            fallback.clone(),
            fuse.clone(),
            strip.clone(),
        ]),
        sequence(&[replace("▁", " "), fallback.clone()]),
        sequence(&[fuse.clone(), replace("b b", "c")]),
        sequence(&[fuse.clone(), replace("\u{fffd}", " ")]),
        sequence(&[fuse.clone(), replace(".", " ")]),
        sequence(&[word_piece.clone(), fallback.clone()]),
        sequence(&[metaspace, fallback.clone(), fuse.clone(), strip.clone()]),
        sequence(&[strip.clone(), fallback.clone(), fuse.clone()]),
        sequence(&[fallback.clone(), byte_level]),
        sequence(&[fuse.clone(), fallback.clone()]),
        sequence(&[fuse.clone(), word_piece]),
        sequence(&[
            fallback,
            fuse,
            json!({"type": "Strip", "content": "a", "start": 2, "stop": 1}),
        ]),
    ]
}

proptest! {
    #![proptest_config(cases(256))]

    /// Byte-level and byte-fallback tokenizers: most of the tokens are single bytes.
    #[test]
    fn a_stream_is_the_text_of_all_tokens_less_that_of_the_context(
        name in prop::sample::select(NAMES.to_vec()),
        tokens in prop::collection::vec(0..425_u32, 0..24),
        texts in prop::collection::vec(any::<String>(), 0..3),
        emoji in prop::collection::vec("[🙂👩\u{200d}👧é語 a]{1,6}", 0..3),
        n_context in any::<prop::sample::Index>(),
        mixed in any::<prop::sample::Index>(),
    ) {
        let tokenizer = read(&golden().join(name));
        let mut all = Vec::new();
        for text in texts.iter().chain(&emoji) {
            all.extend(tokenizer.encode(text).unwrap());
        }
        // Characters that other tokens break.
        let at = mixed.index(all.len() + 1);
        drop(all.splice(at..at, tokens));
        check_stream(&tokenizer, &all, n_context.index(all.len() + 1))?;
    }

    #[test]
    fn a_stream_takes_no_text_back_whatever_the_decoder(
        at in 0..18_usize,
        tokens in prop::collection::vec(0..20_u32, 0..12),
        n_context in any::<prop::sample::Index>(),
    ) {
        let tokenizer = with_decoder(&decoders()[at]);
        let n_context = n_context.index(tokens.len() + 1);
        // Some decoders need a token.
        prop_assume!(tokenizer.decode(&tokens).is_ok() && tokenizer.decode(&tokens[..n_context]).is_ok());
        check_stream(&tokenizer, &tokens, n_context)?;
    }
}

#[test]
fn pieces_come_as_soon_as_they_are_final() {
    let pieces = |name: &str, context: &[&str], tokens: &[&str]| -> Vec<String> {
        let tokenizer = read(&golden().join(name));
        let id = |token: &&str| {
            tokenizer
                .token_to_id(token)
                .unwrap_or_else(|| panic!("{token}"))
        };
        let context: Vec<u32> = context.iter().map(id).collect();
        let mut stream = tokenizer.stream(&context).unwrap();
        let mut pieces: Vec<String> = tokens
            .iter()
            .map(|token| stream.push(id(token)).unwrap())
            .collect();
        pieces.push(stream.finish().unwrap());
        pieces
    };
    // A whole character, a broken one, and a word: all bytes of the run become replacement characters.
    let broken = ["<0xEC>", "<0x84>", "<0xAC>", "<0xE1>", "▁in"];
    assert_eq!(
        pieces("llama", &["<s>", "▁the"], &broken),
        ["", "", "", "", "���� in", ""]
    );
    let whole = ["<0xEC>", "<0x84>", "</s>", "<0xAC>", "▁in"];
    assert_eq!(
        pieces("llama", &["▁the"], &whole),
        ["", "", "", "", "섬 in", ""]
    );
    assert_eq!(pieces("llama", &["▁the"], &whole[..2]), ["", "", "��"]);
    // The prompt ends in the character; the space before a text is no part of it.
    assert_eq!(
        pieces("llama", &["▁a", "<0xC3>"], &["<0xA9>", "▁a"]),
        ["", "é a", ""]
    );
    assert_eq!(pieces("llama", &["<s>"], &["▁a", "▁a"]), ["a", " a", ""]);
    assert_eq!(pieces("llama", &["▁a"], &["▁a"]), [" a", ""]);
    assert_eq!(
        pieces(
            "gpt2",
            &["a", "Ã"],
            &["©", "Ġ", "ð", "Ł", "<|endoftext|>", "ĺ", "Ĥ"]
        ),
        ["é", " ", "", "", "", "", "😂", ""]
    );
    assert_eq!(
        pieces("gpt2", &["a"], &["ð", "Ł", "a"]),
        ["", "", "\u{fffd}a", ""]
    );
}

/// A model that writes these tokens after the first, with one of the tokenizers.
fn writes(name: &str, tokens: &[&str], stop: &[&str]) -> (tempfile::TempDir, Pretrained) {
    let dir = copy(name);
    let tokenizer = read(dir.path());
    let id = |token: &&str| {
        tokenizer
            .token_to_id(token)
            .unwrap_or_else(|| panic!("{token}"))
    };
    let ids: Vec<u32> = tokens.iter().map(id).collect();
    let script: Vec<(u32, u32)> = ids.windows(2).map(|pair| (pair[0], pair[1])).collect();
    let stop: Vec<u32> = stop.iter().map(id).collect();
    write_scripted(dir.path(), 425, &script, &stop);
    let lm = models::load(dir.path(), &Device::flex()).unwrap();
    (dir, lm)
}

/// What a model writes after a prompt, in pieces.
fn written(
    lm: &Pretrained,
    prompt: &[&str],
    settings: &Generation,
) -> (Vec<String>, String, usize) {
    let id = |token: &&str| lm.tokenizer().unwrap().token_to_id(token).unwrap();
    let prompt: Vec<u32> = prompt.iter().map(id).collect();
    let mut pieces = Vec::new();
    let found = lm.generate(&prompt, settings, |piece| {
        pieces.push(piece.to_owned());
        ControlFlow::Continue(())
    });
    let found = found.unwrap();
    assert_eq!(pieces.concat(), found.text);
    (pieces, found.text, found.tokens.len())
}

#[test]
fn a_generation_goes_on_after_bytes_that_are_no_character() {
    let tokens = [
        "▁the", "<0xEC>", "<0x84>", "<0xAC>", "<0xE1>", "▁in", "▁a", "</s>", "▁do",
    ];
    let (_dir, lm) = writes("llama", &tokens, &["</s>"]);
    let settings = Generation::new(20);
    let (pieces, _, n) = written(&lm, &["<s>", "▁the"], &settings);
    assert_eq!((pieces, n), (vec!["���� in".to_owned(), " a".into()], 7));
    // The last token completes no character.
    let settings = Generation::new(2);
    assert_eq!(written(&lm, &["▁the"], &settings).1, "��");
    // The prompt has the first byte: the character is that of both, broken by what follows.
    let settings = Generation::new(20);
    assert_eq!(written(&lm, &["▁the", "<0xEC>"], &settings).1, "��� in a");
    let tokens = ["ð", "Ł", "ĺ", "Ĥ", "a", "<extra>", "e"];
    let (_dir, lm) = writes("gpt2", &tokens, &[]);
    assert_eq!(
        written(&lm, &["a", "ð", "Ł"], &Generation::new(3)).0,
        ["😂", "a"]
    );
}

#[test]
fn a_generation_ends_at_each_of_several_tokens_and_strings() {
    let tokens = ["Ġ", "a", "t", "e", "<|im_start|>", "o"];
    for stop in ["t", "e"] {
        let (_dir, lm) = writes("gpt2", &tokens, &["z", stop]);
        let (_, text, _) = written(&lm, &["Ġ"], &Generation::new(20));
        assert!(text.ends_with(stop), "{text}");
    }
    let (_dir, lm) = writes("gpt2", &tokens, &[]);
    // In the text of several tokens, and in special tokens, which are no part of the text.
    for (stop, expected, n) in [
        ("te", "ate", 3),
        ("e<|im_", "ate<|im_start|>", 4),
        ("eo", "ate<|im_start|>o", 9),
    ] {
        let settings = Generation::new(9).with_stop_strings(["", stop]);
        let (_, text, n_tokens) = written(&lm, &["Ġ"], &settings);
        assert!(text.starts_with(expected), "{text}, not {expected}");
        assert_eq!(n_tokens, n, "{stop}");
    }
}

#[test]
fn a_tokenizer_json_comes_first() {
    let dir = copy("gpt2");
    fs::remove_file(dir.path().join("added_tokens.json")).unwrap();
    fixtures::write_tokenizer(&dir.path().join("tokenizer.json"), 4);
    assert_eq!(read(dir.path()).encode("w1 w3").unwrap(), [1, 3]);
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert!(read(dir.path()).path().ends_with("vocab.json"));
    // The class decides where there are several.
    fs::copy(
        golden().join("llama/tokenizer.model"),
        dir.path().join("tokenizer.model"),
    )
    .unwrap();
    assert!(read(dir.path()).path().ends_with("vocab.json"));
    fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    assert!(read(dir.path()).path().ends_with("tokenizer.model"));
    fs::remove_file(dir.path().join("tokenizer.model")).unwrap();
    fs::remove_file(dir.path().join("merges.txt")).unwrap();
    assert!(Tokenizer::read(dir.path()).unwrap().is_none());
}

#[test]
fn a_model_without_tokenizer_json_is_saved_with_its_vocabulary() {
    let (source, lm) = pretrained(fixtures::llama().with_vocab_size(425), 1);
    let dir = source.path().join("model");
    models::save(&lm, &dir).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::remove_file(dir.join(file)).unwrap();
    }
    let bare = models::load(&dir, &Device::flex()).unwrap();
    assert!(matches!(
        bare.tokenizer(),
        Err(Error::Text(TextError::NoTokenizer { .. }))
    ));
    let mut identities = vec![bare.model.identity()];
    for (name, files) in [
        ("opt", &["vocab.json", "merges.txt"][..]),
        ("mistral", &["tokenizer.model"]),
    ] {
        let all = [
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ];
        for file in files.iter().chain(&all) {
            fs::copy(golden().join(name).join(file), dir.join(file)).ok();
        }
        let lm = models::load(&dir, &Device::flex()).unwrap();
        let tokens = lm.encode_text("Hello, the world").unwrap();
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("saved");
        models::save(&lm, &out).unwrap();
        for file in files.iter().chain(&all[..2]) {
            let of = |dir: &Path| fs::read(dir.join(file)).unwrap();
            assert_eq!(of(&out), of(&dir), "{file}");
        }
        let again = models::load(&out, &Device::flex()).unwrap();
        assert_eq!(again.encode_text("Hello, the world").unwrap(), tokens);
        let identity = lm.model.identity();
        assert_eq!(again.model.identity(), identity);
        assert!(!identities.contains(&identity));
        identities.push(identity);
        for file in files.iter().chain(&all) {
            fs::remove_file(dir.join(file)).ok();
        }
    }
}

#[test]
fn spaces_before_punctuation_are_removed_where_transformers_does() {
    let dir = copy("unigram");
    let path = dir.path().join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let decoded = |dir: &Path| {
        let tokenizer = read(dir);
        let tokens = tokenizer.encode("a , b n't do 's .").unwrap();
        check_stream(&tokenizer, &tokens, 3).unwrap();
        tokenizer.decode(&tokens).unwrap()
    };
    assert_eq!(decoded(dir.path()), "a , b n't do 's .");
    config["clean_up_tokenization_spaces"] = true.into();
    fs::write(&path, config.to_string()).unwrap();
    assert_eq!(decoded(dir.path()), "a, bn't do's.");
    // It would change what a BPE model has written.
    fs::copy(
        golden().join("llama/tokenizer.model"),
        dir.path().join("tokenizer.model"),
    )
    .unwrap();
    assert_eq!(decoded(dir.path()), "a , b n't do 's .");
}

/// A message of Protocol Buffers: a field of bytes.
fn field(tag: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![tag << 3 | 2];
    let mut n = bytes.len();
    while n > 127 {
        field.push(n as u8 | 128);
        n >>= 7;
    }
    field.push(n as u8);
    field.extend(bytes);
    field
}

fn piece(text: &str, score: f32) -> Vec<u8> {
    let score: Vec<u8> = [0x15].into_iter().chain(score.to_le_bytes()).collect();
    field(1, &[field(1, text.as_bytes()), score].concat())
}

#[test]
fn vocabularies_that_are_damaged_are_refused() {
    let bpe = field(2, &[0x18, 2]);
    let model = |pieces: &[Vec<u8>]| [pieces.concat(), bpe.clone()].concat();
    let whole = fs::read(golden().join("llama/tokenizer.model")).unwrap();
    let all: Vec<Vec<u8>> = (1..18_u32)
        .flat_map(|n| (0..1 << n).map(move |bits| (n, bits)))
        .map(|(n, bits)| {
            (0..n)
                .map(|at| if bits >> at & 1 == 0 { 'a' } else { 'b' })
                .collect::<String>()
        })
        .map(|text| piece(&text, 0.0))
        .collect();
    let of_model = [
        (b"IQ== 0\nIg== 1\n".to_vec(), "is no model of SentencePiece"),
        (Vec::new(), "has no pieces"),
        (
            whole[..whole.len() / 2].to_vec(),
            "is no model of SentencePiece",
        ),
        (
            model(&[piece("a", 0.0), piece("", 0.0)]),
            "pieces[1]: is empty",
        ),
        (
            model(&[piece("a", 0.0), piece("a", 1.0)]),
            "pieces[1]: is `a`, as another is",
        ),
        (
            model(&[piece("a", f32::NAN)]),
            "pieces[0]: has the score NaN",
        ),
        (
            model(&[piece(&"x".repeat(600), 0.0)]),
            "has a piece of 600 bytes",
        ),
        (vec![0x0a; 1 << 23], "has up to 8388608 pieces"),
        (vec![0; (1 << 24) + 1], "has 16777217 bytes"),
        (
            [piece("a", 0.0), field(2, &[0x18, 4])].concat(),
            "model_type: is 4",
        ),
        (
            [piece("a", 0.0), field(2, &[0x18, 1, 0xc0, 2, 9])].concat(),
            "model: ",
        ),
        (
            [piece("a", 0.0), field(3, &field(2, &[1, 2]))].concat(),
            "precompiled_charsmap: is cut off",
        ),
        (model(&all), "has more than 2000000 pairs of pieces"),
    ];
    let dir = copy("mistral");
    fs::remove_file(dir.path().join("added_tokens.json")).unwrap();
    for (bytes, expected) in of_model {
        refused(dir.path(), "tokenizer.model", &bytes, expected);
    }
    let dir = copy("opt");
    let of_vocab: [(&[u8], &str); 5] = [
        (b"{\"a\": 0", "is not a JSON object"),
        (b"[1]", "is not a JSON object"),
        (b"{\"a\": -1}", "`a` has the id -1"),
        (b"{\"a\": 4294967296}", "`a` has the id 4294967296"),
        (b"{\"a\": \"b\"}", "`a` has the id \"b\""),
    ];
    for (bytes, expected) in of_vocab {
        refused(dir.path(), "vocab.json", bytes, expected);
    }
    let of_merges: [(&[u8], &str); 6] = [
        (b"#version: 0.2\na\n", "line 2: `a` is not two tokens"),
        (
            b"#version: 0.2\na b c\n",
            "line 2: `a b c` is not two tokens",
        ),
        (b"#version: 0.2\n a\n", "line 2: ` a` is not two tokens"),
        (b"a zzzz\n", "line 1: `zzzz` is not in `vocab.json`"),
        // Each makes the other.
        (b"a b\nab a\n", "line 1: `ab` is not in `vocab.json`"),
        (b"\xff \xff\n", "is not UTF-8"),
    ];
    for (bytes, expected) in of_merges {
        refused(dir.path(), "merges.txt", bytes, expected);
    }
    let same = br#"{"a": 0, "b": 0, "</s>": 1, "<pad>": 2}"#;
    fs::write(dir.path().join("merges.txt"), "#version: 0.2\n").unwrap();
    refused(
        dir.path(),
        "vocab.json",
        same,
        "model: vocab: `a` and `b` have the same id 0",
    );
    let dir = copy("gpt2");
    fs::write(dir.path().join("added_tokens.json"), r#"{"<far>": 4000}"#).unwrap();
    let error = Tokenizer::read(dir.path()).unwrap_err();
    assert!(
        error.to_string().contains("`<far>` has the id 4000"),
        "{error}"
    );
    for bad in ["{\"<x>\": -4}", "[]"] {
        fs::write(dir.path().join("added_tokens.json"), bad).unwrap();
        let error = Tokenizer::read(dir.path()).unwrap_err();
        let named = matches!(&error, Error::Config(ConfigError::Setting { path, .. }) if path.ends_with("added_tokens.json"));
        assert!(named, "{error}");
    }
}

/// Asserts that a file is refused by its name, and puts it back.
#[track_caller]
fn refused(dir: &Path, name: &str, bytes: &[u8], expected: &str) {
    let path = dir.join(name);
    let before = fs::read(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    let error = Tokenizer::read(dir).unwrap_err();
    let named = matches!(&error, Error::Text(TextError::Tokenizer { path: of, problem })
        if *of == path && problem.contains(expected));
    assert!(named, "{error}, not {expected}");
    fs::write(&path, before).unwrap();
}
