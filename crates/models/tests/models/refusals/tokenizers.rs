//! Files of tokenizers that are damaged, or ask for more than any tokenizer needs.

use std::path::Path;
use std::thread;

use models::{Error, SpecialTokens, TextError, Tokenizer};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::TOKENIZER;

/// A tokenizer that is in use.
const PUBLISHED: &[u8] = include_bytes!("../../../../../examples/data/llama/tokenizer.json");

/// Texts that a tokenizer may stumble over.
const TEXTS: [&str; 12] = [
    "",
    "a",
    "Hello world, it's 12345 x q c aab",
    "\0\0a\0",
    "e\u{301}\u{301}\u{327}क्षि ñ é",
    "野口 No",
    "ﷺ ½ ㌀ İ ẞ",
    "👩‍👩‍👧‍👦 🇩🇪",
    " \n\t\u{a0}\u{3000}\r\n  ",
    "<s></s><unk>[CLS] [MASK]  <m> <x>   y",
    "▁▁ ▁a\u{fffd}\u{feff}\u{200b}",
    "ABCABC ABé``''",
];

fn read(bytes: &[u8]) -> Result<Tokenizer, Error> {
    Tokenizer::from_bytes(bytes, Path::new(TOKENIZER))
}

fn tokenizer(json: &Value) -> Tokenizer {
    read(json.to_string().as_bytes()).unwrap()
}

/// The problem that a file is refused for.
fn problem(json: &Value) -> String {
    problem_of(read(json.to_string().as_bytes()).unwrap_err())
}

fn problem_of(error: Error) -> String {
    match error {
        Error::Text(TextError::Tokenizer { path, problem }) if path == Path::new(TOKENIZER) => {
            problem
        }
        error => panic!("{error:?}"),
    }
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": !special, "rstrip": false,
        "normalized": !special, "special": special})
}

fn template(before: &str, id: u32) -> Value {
    json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": before, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {before: {"id": before, "ids": [id], "tokens": [before]}}})
}

/// A table of characters in which `A` becomes `abc`, and `B` nothing.
///
/// The children of the root are units 256 to 511, of which each leaf has its value after 512.
fn charsmap() -> Vec<u8> {
    let mut units = vec![0_u32; 768];
    units[0] = 256 << 10;
    for (at, (byte, value)) in [(b'A', 0), (b'B', 4)].into_iter().enumerate() {
        let (node, leaf) = (256 ^ usize::from(byte), 512 + at);
        units[node] = ((node ^ leaf) as u32) << 10 | 1 << 8 | u32::from(byte);
        units[leaf] = 1 << 31 | value;
    }
    let units = units.iter().flat_map(|unit| unit.to_le_bytes());
    let n_bytes = 4_u32 * 768;
    n_bytes
        .to_le_bytes()
        .into_iter()
        .chain(units)
        .chain(*b"abc\0\0")
        .collect()
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = |bytes: &[u8]| {
        let mut padded = [0; 4];
        padded[1..=bytes.len()].copy_from_slice(bytes);
        let bits = u32::from_be_bytes(padded);
        let digit = |at: usize| match at {
            at if at > bytes.len() => '=',
            at => char::from(DIGITS[(bits >> (18 - 6 * at)) as usize % 64]),
        };
        [0, 1, 2, 3].map(digit)
    };
    bytes.chunks(3).flat_map(digits).collect()
}

fn unigram() -> Value {
    json!({"added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "<m>", false)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": base64(&charsmap())},
            {"type": "Strip", "strip_left": false, "strip_right": true},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "post_processor": template("<s>", 1),
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": true, "vocab": [["<unk>", 0.0],
            ["<s>", 0.0], ["<m>", -1.0], ["▁", -2.0], ["a", -3.0], ["b", -3.5], ["ab", -3.25],
            ["▁a", -4.0], ["c", -5.0], ["<0x41>", -6.0]]}})
}

fn word_piece() -> Value {
    json!({"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 4_000_000_000_000_u64}, "direction": "Right",
            "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [added(1, "[UNK]", true), added(2, "[CLS]", true), added(4, "[MASK]", false)],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3,
            "[MASK]": 4, "hello": 5, "##o": 6, "a": 7, "##a": 8, "world": 9, ",": 10, "##2": 11}}})
}

fn word_level() -> Value {
    json!({"added_tokens": [added(0, "<unk>", true), added(9, "<x>", false), added(10, " y", true)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "NFKC"},
            {"type": "NFKD"}, {"type": "NFC"}, {"type": "Nmt"}, {"type": "Lowercase"},
            {"type": "StripAccents"}, {"type": "Strip", "strip_left": true, "strip_right": true},
            {"type": "Prepend", "prepend": "_"},
            {"type": "Replace", "pattern": {"String": "``"}, "content": "\""}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"},
            {"type": "WhitespaceSplit"}, {"type": "CharDelimiterSplit", "delimiter": "x"},
            {"type": "Punctuation", "behavior": "Isolated"}, {"type": "Digits", "individual_digits": true},
            {"type": "UnicodeScripts"}, {"type": "FixedLength", "length": 5},
            {"type": "Split", "pattern": {"Regex": "a+(?!b)|c"}, "behavior": "MergedWithNext", "invert": true}]},
        "post_processor": {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1],
            "trim_offsets": true, "add_prefix_space": true},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2,
            "hello": 3, "world": 4, "a": 5, "aa": 6, "1": 7, "it": 8}}})
}

fn bpe() -> Value {
    json!({"version": "1.0", "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "(?i:'s|'t)|\\p{L}+|\\p{N}{1,3}|\\s+(?!\\S)|\\s+"},
                "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false}, template("<s>", 1)]},
        "decoder": {"type": "WordPiece", "prefix": "@@", "cleanup": false},
        "model": {"type": "BPE", "unk_token": "<unk>", "continuing_subword_prefix": "@@",
            "end_of_word_suffix": "</w>", "byte_fallback": true, "vocab": {"<unk>": 0, "<s>": 1, "h": 2,
            "@@e": 3, "@@l": 4, "@@o</w>": 5, "he": 6, "@@ll": 7, "hell": 8, "hello</w>": 9, "a": 10,
            "@@a": 11, "aa": 12}, "merges": [["h", "@@e"], ["@@l", "@@l"], ["he", "@@ll"],
            ["hell", "@@o</w>"], ["a", "@@a"]]}})
}

/// Tokenizers that together have every model and nearly every other part.
fn all() -> [Value; 5] {
    let published = serde_json::from_slice(PUBLISHED).unwrap();
    [unigram(), word_piece(), word_level(), bpe(), published]
}

/// Encodes texts and decodes tokens, and returns the problems of encoding. Some tokens have no text: the
/// error of a decoder must only be a typed one.
fn use_all(tokenizer: &Tokenizer, texts: &[&str]) -> Vec<String> {
    let mut problems = Vec::new();
    let mut tokens: Vec<u32> = (0..16).chain([1 << 31, u32::MAX]).collect();
    for text in texts {
        match tokenizer.encode(text) {
            Ok(found) => tokens.extend(&found[..found.len().min(100)]),
            Err(error) => problems.push(problem_of(error)),
        }
        let again = tokenizer.encode_with_starts(text);
        problems.extend(again.err().map(problem_of));
    }
    for tokens in [&[], &tokens[..1], &tokens[..]] {
        tokenizer.decode(tokens).err().map(problem_of);
    }
    let mut stream = tokenizer.stream(&[]).unwrap();
    let failed = tokens.iter().find_map(|&token| stream.push(token).err());
    failed.map(problem_of);
    problems
}

#[test]
fn a_file_that_is_cut_off_is_refused() {
    let small = word_level().to_string().into_bytes();
    let published = PUBLISHED.trim_ascii_end();
    for (file, step) in [(small.as_slice(), 1), (published, 50)] {
        for n in (0..file.len()).step_by(step) {
            let problem = problem_of(read(&file[..n]).unwrap_err());
            assert!(
                problem.starts_with("is not a JSON object: "),
                "{n}: {problem}"
            );
        }
        assert!(read(file).is_ok());
    }
}

/// The same document with another value at a pointer.
fn with(json: &Value, pointer: &str, value: Value) -> Value {
    let mut json = json.clone();
    *json
        .pointer_mut(pointer)
        .unwrap_or_else(|| panic!("{pointer}")) = value;
    json
}

fn nested(depth: usize, key: &str, inner: Value) -> Value {
    let sequence = |inner| json!({"type": "Sequence", key: [inner]});
    (0..depth).fold(inner, |inner, _| sequence(inner))
}

#[test]
fn a_file_that_asks_for_too_much_is_refused() {
    let long = |n| "x".repeat(n);
    let map = "/normalizer/normalizers/0/precompiled_charsmap";
    let charsmap_of = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut map = charsmap();
        change(&mut map);
        json!(base64(&map))
    };
    let longer = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    let longer = json!({"type": "Sequence", "normalizers": vec![longer; 14]});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
    let two = json!({"type": "Sequence", "processors": [template("<s>", 1), template("<s>", 1)]});
    let cases = [
        // A trie of a gigabyte of entries, in a map of 12 bytes.
        (
            with(&unigram(), map, json!("/////wAAAAAAAAAA")),
            "precompiled_charsmap: states a trie of 4294967292",
        ),
        (
            with(&unigram(), map, Value::Null),
            "normalizer.normalizers[0]: precompiled_charsmap: is not a string",
        ),
        (with(&unigram(), map, json!("AAA")), "is not in base64"),
        (with(&unigram(), map, json!("AA==")), "is cut off"),
        (
            with(&unigram(), map, json!("AAAAAA==")),
            "index out of range",
        ),
        (
            with(
                &unigram(),
                map,
                charsmap_of(&|map| map[4..8].copy_from_slice(&[0xff; 4])),
            ),
            "index out of range",
        ),
        // The values of `A` and of `B`, in units 512 and 513.
        (
            with(&unigram(), map, charsmap_of(&|map| map[2052] = 6)),
            "index out of range",
        ),
        (
            with(&unigram(), map, charsmap_of(&|map| map[2056] = 200)),
            "index out of range",
        ),
        (
            with(&unigram(), map, charsmap_of(&|map| map.truncate(3000))),
            "states a trie of 3072",
        ),
        (
            with(&unigram(), map, json!(base64(&vec![0; 4 << 20]))),
            "has a string of",
        ),
        (
            with(&unigram(), "/model/vocab/5/0", json!(long(130_000))),
            "model: has a string of 130000",
        ),
        (
            with(&unigram(), "/model/vocab/5/0", json!(long(513))),
            "vocab[5]: has a piece of 513",
        ),
        (
            with(&unigram(), "/model/unk_id", json!(10)),
            "model: Unable to load vocab",
        ),
        (
            with(
                &unigram(),
                "/pre_tokenizer",
                nested(
                    16,
                    "pretokenizers",
                    json!({"type": "Digits", "individual_digits": true}),
                ),
            ),
            "pre_tokenizer: is nested",
        ),
        (
            with(
                &unigram(),
                "/normalizer",
                nested(100, "normalizers", json!({"type": "NFC"})),
            ),
            "recursion limit",
        ),
        (
            with(&unigram(), "/normalizer", longer),
            "normalizer, pre_tokenizer: can make a text 65536 times longer",
        ),
        (
            with(
                &unigram(),
                "/decoder",
                json!({"type": "Replace", "pattern": {"Regex": "a?"}, "content": long(10_000)}),
            ),
            "decoder: can make a token 10001 times longer",
        ),
        (
            with(
                &unigram(),
                "/pre_tokenizer",
                json!({"type": "Sequence", "pretokenizers": vec![&byte_level; 64]}),
            ),
            "has 65 steps",
        ),
        (
            with(
                &unigram(),
                "/pre_tokenizer",
                json!({"type": "Sequence", "pretokenizers": vec![&byte_level; 7]}),
            ),
            "can make a text",
        ),
        (
            with(
                &word_level(),
                "/pre_tokenizer/pretokenizers/6/length",
                json!(0),
            ),
            "pre_tokenizer.pretokenizers[6]: length: is 0",
        ),
        (
            with(
                &word_level(),
                "/pre_tokenizer/pretokenizers/7/pattern/Regex",
                json!(long(17_000)),
            ),
            "pattern: has 17000 bytes",
        ),
        // The crate also reads the values of a part from an array.
        (
            with(
                &unigram(),
                "/normalizer",
                json!([{"String": "a"}, long(60_000)]),
            ),
            "normalizer: is not an object",
        ),
        (
            with(
                &unigram(),
                "/normalizer",
                json!({"type": "Sequence", "normalizers": [[{"String": "a"}, long(60_000)]]}),
            ),
            "normalizer.normalizers[0]: is not an object",
        ),
        (
            with(
                &unigram(),
                "/pre_tokenizer",
                json!(["Split", {"Regex": "a"}, "Isolated", false]),
            ),
            "pre_tokenizer: is not an object",
        ),
        (
            with(
                &unigram(),
                "/decoder",
                json!({"type": "Sequence", "decoders": vec![[""]; 60]}),
            ),
            "decoder.decoders[0]: is not an object",
        ),
        (
            with(&unigram(), "/post_processor", json!(["TemplateProcessing"])),
            "post_processor: is not an object",
        ),
        (
            with(&unigram(), "/model", json!([[], 0])),
            "model: is not an object",
        ),
        (
            with(
                &unigram(),
                "/added_tokens",
                json!([{"id": 0, "content": long(513), "normalized": true}]),
            ),
            "added_tokens: [0]: has a content of 513",
        ),
        (
            with(
                &with(
                    &unigram(),
                    "/normalizer",
                    json!({"type": "Replace", "pattern": {"Regex": "x?"}, "content": long(5_000)}),
                ),
                "/added_tokens",
                json!(vec![
                    json!({"id": 0, "content": long(500), "normalized": true});
                    200
                ]),
            ),
            "added_tokens: has 100000 bytes",
        ),
        (
            with(
                &unigram(),
                "/pre_tokenizer",
                json!({"type": "Split", "pattern": {"Regex": "(?=\\w{200})".repeat(20)},
                    "behavior": "Isolated", "invert": false}),
            ),
            "has 20 look-arounds",
        ),
        (
            with(
                &unigram(),
                "/pre_tokenizer",
                json!({"type": "Split", "pattern": {"Regex": long(5_000)},
                    "behavior": "Isolated", "invert": false}),
            ),
            "bytes of regular expressions; at most 4096",
        ),
        (
            with(&word_level(), "/model/unk_token", json!(long(600))),
            "unk_token: has 600 bytes",
        ),
        (
            with(&word_level(), "/model/vocab/a", json!(3)),
            "model: vocab: `a` and `hello` have the same id 3",
        ),
        (
            with(
                &word_piece(),
                "/model/max_input_chars_per_word",
                json!(u64::MAX),
            ),
            "max_input_chars_per_word: is 18446744073709551615",
        ),
        (
            with(&bpe(), "/model/merges/3/1", json!("hello</w>")),
            "merges[3]: `hell` and `hello</w>` make no token",
        ),
        (
            with(&bpe(), "/model/merges/0/1", json!("a")),
            "merges[0]: `h` and `a` make no token",
        ),
        (
            with(&bpe(), "/model/merges/0/1", json!("é")),
            "Token `é` out of vocabulary",
        ),
        (
            with(
                &with(&bpe(), "/model/merges/0/1", json!("é")),
                "/model/continuing_subword_prefix",
                json!("x"),
            ),
            "merges[0]: `h` and `é` make no token",
        ),
        (
            with(&bpe(), "/post_processor", two),
            "processors[1]: is a second template, after post_processor.processors[0]",
        ),
        (
            with(&unigram(), "/post_processor/special_tokens", json!({})),
            "single: `<s>` is not in special_tokens",
        ),
        (
            with(
                &unigram(),
                "/post_processor/single/1/Sequence/id",
                json!("B"),
            ),
            "single: has a second text",
        ),
        (
            with(
                &unigram(),
                "/post_processor/single/0",
                json!({"Sequence": {"id": "A", "type_id": 0}}),
            ),
            "has the text 2 times",
        ),
        (
            with(&unigram(), "/decoder", json!({"type": "none"})),
            "decoder: ",
        ),
        (
            with(&unigram(), "/added_tokens/1/id", json!(7)),
            "`<s>` has the id 7",
        ),
    ];
    for (json, expected) in &cases {
        let problem = problem(json);
        assert!(problem.contains(expected), "{expected}: {problem}");
        assert!(!problem.contains("panicked"), "{problem}");
    }
    let problem = problem_of(read(&[b' '; 100_000_001]).unwrap_err());
    assert!(problem.contains("has 100000001 bytes"), "{problem}");
}

/// A token before texts must be one of the vocabulary.
#[test]
fn a_template_may_not_add_what_is_no_token() {
    let tokenizer = tokenizer(&with(
        &unigram(),
        "/post_processor/special_tokens/<s>/ids/0",
        json!(99),
    ));
    let dir = tempfile::tempdir().unwrap();
    let problem = problem_of(SpecialTokens::read(dir.path(), &tokenizer).unwrap_err());
    assert!(
        problem.contains("post_processor: adds the token 99"),
        "{problem}"
    );
}

/// What is at the bounds is read, used and dropped on a stack of 256 KiB.
#[test]
fn little_stack_is_enough_at_the_bounds() {
    let digits = json!({"type": "Digits", "individual_digits": true});
    let json = with(&unigram(), "/model/vocab/5/0", json!("x".repeat(512)));
    let json = with(&json, "/pre_tokenizer", nested(15, "pretokenizers", digits));
    let json = with(
        &json,
        "/decoder",
        nested(15, "decoders", json!({"type": "Fuse"})),
    );
    let json = with(
        &json,
        "/post_processor",
        nested(13, "processors", template("<s>", 1)),
    );
    let run = move || {
        let tokenizer = tokenizer(&json).clone();
        let long = "x".repeat(512 * 20);
        assert_eq!(tokenizer.encode(&long).unwrap(), [5; 20]);
        use_all(&tokenizer, &TEXTS)
    };
    let thread = thread::Builder::new().stack_size(256 << 10).spawn(run);
    assert_eq!(thread.unwrap().join().unwrap(), Vec::<String>::new());
}

#[test]
fn texts_of_every_kind_are_encoded() {
    let long = [
        "x".repeat(200_000),
        " ".repeat(200_000),
        "e\u{301}".repeat(60_000),
        "\0".repeat(200_000),
    ];
    let texts: Vec<&str> = TEXTS
        .into_iter()
        .chain(long.iter().map(String::as_str))
        .collect();
    for json in all() {
        let mut problems = use_all(&tokenizer(&json), &texts);
        // One of the files has more steps than any in use, each of which can make a text longer.
        problems.retain(|problem| !problem.ends_with("3267 times longer; split the text"));
        assert_eq!(problems, Vec::<String>::new());
    }
}

#[test]
fn dropout_is_ignored() {
    let text = "hello hello aaaaaaaaaaaaaaaaaaaaaa hello aaaaaaaaa";
    let expected = tokenizer(&bpe()).encode(text).unwrap();
    for dropout in [json!(0.5), json!(1), json!(7)] {
        let mut json = bpe();
        json["model"]["dropout"] = dropout;
        let tokenizer = tokenizer(&json);
        for _ in 0..5 {
            assert_eq!(tokenizer.encode(text).unwrap(), expected);
        }
    }
}

/// The library cuts off more spaces than there are.
#[test]
fn a_panic_of_the_library_is_an_error() {
    let json = with(&word_level(), "/decoder/decoders/4/stop", json!(2));
    let tokenizer = tokenizer(&json);
    let problem = problem_of(tokenizer.decode(&[1 << 31]).unwrap_err());
    assert!(problem.contains("`tokenizers` panicked: "), "{problem}");
    assert!(tokenizer.encode("hello").is_ok());
}

/// A part of a document: the deeper, the less likely.
fn pick<'a>(value: &'a mut Value, rng: &mut ChaCha8Rng) -> &'a mut Value {
    let n = match value {
        Value::Object(values) => values.len(),
        Value::Array(values) => values.len(),
        _ => 0,
    };
    if n == 0 || rng.random_ratio(1, 4) {
        return value;
    }
    let at = rng.random_range(0..n);
    match value {
        Value::Object(values) => pick(values.values_mut().nth(at).unwrap(), rng),
        value => pick(&mut value[at], rng),
    }
}

/// Changes a part of a document: numbers become huge, strings double, parts change places.
fn change(json: &mut Value, rng: &mut ChaCha8Rng) {
    const NUMBERS: [u64; 8] = [
        0,
        1,
        3,
        1 << 10,
        1 << 31,
        u32::MAX as u64,
        1 << 32,
        u64::MAX,
    ];
    const STRINGS: [&str; 16] = [
        "",
        " ",
        "A",
        "B",
        "\0",
        "e\u{301}",
        "▁",
        "<unk>",
        "(?=a)",
        "a*",
        "(a*)*b",
        "\\p{L}{1000}",
        "Unigram",
        "Sequence",
        "never",
        "/////wAAAAAAAAAA",
    ];
    let other = pick(&mut json.clone(), rng).clone();
    let value = pick(json, rng);
    match (rng.random_range(0..8), &mut *value) {
        (0, _) => *value = Value::Null,
        (1, _) => *value = other,
        (2, _) => *value = json!(STRINGS[rng.random_range(0..16)]),
        (_, Value::Null) => *value = json!(NUMBERS[rng.random_range(0..8)]),
        (_, Value::Bool(bit)) => *bit = !*bit,
        (3, Value::Number(_)) => *value = json!(-1e308),
        (_, Value::Number(_)) => *value = json!(NUMBERS[rng.random_range(0..8)]),
        (3, Value::String(text)) => *text = text.repeat(2),
        (4, Value::String(text)) => *text = text.repeat(300),
        (5, Value::String(text)) => *text = text.chars().skip(1).collect(),
        (6, Value::String(text)) => drop(text.pop()),
        (_, Value::String(text)) => text.push_str(STRINGS[rng.random_range(0..16)]),
        (3, Value::Array(values)) => drop(values.pop()),
        (4, Value::Array(values)) => values.reverse(),
        (5, Value::Array(values)) => values.extend(values.clone()),
        (_, Value::Array(values)) => values.push(other),
        (3, Value::Object(values)) => drop(values.insert("type".into(), other)),
        (_, Value::Object(values)) => {
            let at = rng.random_range(0..values.len().max(1));
            if let Some(key) = values.keys().nth(at).cloned() {
                values.remove(&key);
            }
        }
    }
}

/// Changes bits of a file, and leaves out or repeats bytes.
fn change_bytes(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) {
    let at = rng.random_range(0..bytes.len());
    let end = (at + rng.random_range(0..100)).min(bytes.len());
    match rng.random_range(0..3) {
        0 => bytes[at] ^= 1 << rng.random_range(0..8),
        1 => drop(bytes.drain(at..end)),
        _ => bytes.extend_from_within(at..end),
    }
}

/// Files with changes are read or refused, and what is read can be used, without a panic in the library.
#[test]
fn files_with_changes_are_read_or_refused() {
    const N: u32 = 1000;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for original in all() {
        let mut n_read = 0;
        for _ in 0..N {
            let mut json = original.clone();
            let mut bytes = match rng.random_range(0..5) {
                0 => json.to_string().into_bytes(),
                n => {
                    (0..n).for_each(|_| change(&mut json, &mut rng));
                    json.to_string().into_bytes()
                }
            };
            if json == original {
                change_bytes(&mut bytes, &mut rng);
            }
            let problems = match read(&bytes) {
                Ok(tokenizer) => {
                    n_read += 1;
                    use_all(&tokenizer, &TEXTS)
                }
                Err(error) => vec![problem_of(error)],
            };
            for problem in problems {
                assert!(
                    !problem.contains("panicked"),
                    "{problem}: {}",
                    String::from_utf8_lossy(&bytes)
                );
            }
        }
        assert!((N / 10..N * 9 / 10).contains(&n_read), "{n_read} of {N}");
    }
}

/// A file that makes texts longer is used for short ones.
#[test]
fn a_text_that_grows_beyond_bounds_is_refused() {
    let growing =
        json!({"type": "Replace", "pattern": {"String": "a"}, "content": "b".repeat(1000)});
    let json = with(&unigram(), "/normalizer", growing).to_string();
    let tokenizer = Tokenizer::from_bytes(json.as_bytes(), Path::new("tokenizer.json")).unwrap();
    tokenizer.encode(&"a".repeat(100)).unwrap();
    let text = "a".repeat(1 << 20);
    for result in [
        tokenizer.encode(&text).map(|_| ()),
        tokenizer.encode_with_starts(&text).map(|_| ()),
    ] {
        let problem = result.unwrap_err().to_string();
        assert!(problem.contains("4000 times longer"), "{problem}");
    }
}

/// A file of values, each of which takes many times its text in memory, is refused before it is parsed.
#[test]
fn a_file_of_too_many_values_is_refused() {
    let json = format!(r#"{{"other": [{}0]}}"#, "0,".repeat(6_000_000));
    let error = Tokenizer::from_bytes(json.as_bytes(), Path::new("tokenizer.json")).unwrap_err();
    assert!(
        error.to_string().contains("at most 6000000 are read"),
        "{error}"
    );
}
