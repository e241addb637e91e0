//! Headers of safetensors files that lie, and tensors that are no weights.

use std::fs::{self, File};
use std::io::Write;

use safetensors::Dtype;
use tensor_files::TensorFile;

use super::{
    LLAMA, WEIGHTS, assert_file, assert_tensor, change, copy, refusal, refusal_of_plan, without,
};

const DATA: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// A file with this header and 16 bytes of data.
fn file(header: &[u8]) -> Vec<u8> {
    let n_header = (header.len() as u64).to_le_bytes();
    [&n_header[..], header, &DATA[..]].concat()
}

/// A header, of which the parts are entries.
fn header(entries: &[String]) -> Vec<u8> {
    format!("{{{}}}", entries.join(",")).into_bytes()
}

/// A tensor of bytes.
fn entry(name: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}}}"#)
}

/// Asserts that weights with this header are refused, before any is read.
#[track_caller]
fn assert_refused(header: &[u8], part: &str) {
    let dir = without(WEIGHTS);
    fs::write(dir.path().join(WEIGHTS), file(header)).unwrap();
    assert_file(&refusal(dir.path()), WEIGHTS, part);
    assert_file(&refusal_of_plan(dir.path()), WEIGHTS, part);
}

/// None of it is on the disk.
#[test]
fn a_header_beyond_the_limit_of_the_format_is_not_read() {
    let dir = without(WEIGHTS);
    let mut file = File::create(dir.path().join(WEIGHTS)).unwrap();
    file.write_all(&100_000_001_u64.to_le_bytes()).unwrap();
    file.set_len(200_000_000).unwrap();
    assert_file(&refusal(dir.path()), WEIGHTS, "the format allows 100000000");
}

#[test]
fn a_header_that_is_no_object_of_json_is_refused() {
    let deep = "[".repeat(1_000_000);
    let fine = String::from_utf8(header(&[entry("a", "[16]", "[0,16]")])).unwrap();
    assert_refused(b"{\"\xff\":1}", "invalid unicode");
    for (header, part) in [
        (String::new(), "does not begin with `{`"),
        ("a, b".into(), "does not begin with `{`"),
        ("[]".into(), "does not begin with `{`"),
        (format!("\u{feff}{fine}"), "does not begin with `{`"),
        (format!(" {fine}"), "does not begin with `{`"),
        (format!("{fine}x"), "trailing characters"),
        (format!("{fine}{fine}"), "trailing characters"),
        (format!("{fine}\0"), "trailing characters"),
        ("{a}".into(), "key must be a string"),
        (fine[..fine.len() - 1].into(), "EOF"),
        // As deep as a parser that calls itself does not go.
        (deep.clone(), "does not begin with `{`"),
        (format!("{{\"a\":{deep}"), "not a safetensors header"),
        (format!("{{\"a\":{{\"b\":{deep}"), "EOF"),
        (
            format!("{{\"a\":{{\"dtype\":\"U8\",\"shape\":{deep}"),
            "not a safetensors header",
        ),
        (
            format!("{{\"__metadata__\":{deep}"),
            "not a safetensors header",
        ),
        ("{\"__metadata__\":{\"a\":1}}".into(), "invalid type"),
    ] {
        assert_refused(header.as_bytes(), part);
    }
}

/// A reader that keeps one of them would not see what another reader sees.
#[test]
fn a_name_that_comes_twice_is_refused() {
    let (first, second) = (entry("a", "[8]", "[0,8]"), entry("a", "[8]", "[8,16]"));
    // The same name in other letters.
    let escaped = second.replace("\"a\"", "\"\\u0061\"");
    for other in [first.clone(), second, escaped] {
        assert_refused(&header(&[first.clone(), other]), "`a` occurs twice");
    }
    let metadata = |value: &str| format!("\"__metadata__\":{{\"a\":\"{value}\"}}");
    let twice = [metadata("b"), entry("a", "[16]", "[0,16]"), metadata("c")];
    assert_refused(&header(&twice), "`__metadata__` occurs twice");
}

#[test]
fn offsets_that_lie_are_refused() {
    let invalid = "invalid offset for tensor `b`";
    let rows = [
        ("a", "[8]", "[0,8]", "[12]", "[4,16]", invalid),
        ("a", "[4]", "[0,4]", "[8]", "[8,16]", invalid),
        ("a", "[8]", "[0,8]", "[8]", "[0,8]", "invalid offset"),
        ("a", "[8]", "[0,8]", "[8]", "[8,0]", invalid),
        ("a", "[8]", "[0,8]", "[8]", "[16,8]", invalid),
        ("a", "[0]", "[0,0]", "[8]", "[8,16]", invalid),
        ("a", "[8]", "[0,8]", "[8]", "[8]", "its header"),
        ("a", "[8]", "[0,8]", "[8]", "[8,16,24]", "its header"),
        ("a", "[8]", "[0,8]", "[8]", "[8.0,16]", "floating point"),
        ("a", "[8]", "[0,8]", "[8]", "[-8,16]", "integer `-8`"),
    ];
    for (name, shape, offsets, of_other, offsets_of_other, part) in rows {
        let entries = [
            entry(name, shape, offsets),
            entry("b", of_other, offsets_of_other),
        ];
        assert_refused(&header(&entries), part);
    }
    let one = |shape, offsets| header(&[entry("a", shape, offsets)]);
    assert_refused(&one("[12]", "[4,16]"), "invalid offset for tensor `a`");
    // Ends beyond what counts bytes, beyond what the shape says, and beyond the file.
    assert_refused(&one("[16]", "[0,18446744073709551616]"), "floating point");
    assert_refused(&one("[16]", "[0,18446744073709551615]"), "invalid shape");
    assert_refused(
        &one("[2305843009213693951]", "[0,2305843009213693951]"),
        "describes 2305843009213694",
    );
    assert_refused(&one("[8]", "[0,8]"), "the file has");
}

#[test]
fn shapes_and_types_that_lie_are_refused() {
    for (shape, part) in [
        ("[4294967296,4294967296]", "overflow"),
        // As many bits as 64 bits do not count.
        ("[2305843009213693952]", "overflow"),
        ("[0,18446744073709551615,2]", "invalid shape"),
        ("[18446744073709551616]", "floating point"),
        ("[-16]", "integer `-16`"),
        ("[16.0]", "floating point"),
        ("[\"16\"]", "invalid type"),
        ("16", "invalid type"),
        ("null", "invalid type"),
        ("[15]", "invalid shape"),
        ("[]", "invalid shape"),
    ] {
        assert_refused(&header(&[entry("a", shape, "[0,16]")]), part);
    }
    for (dtype, part) in [
        ("F7", "unknown variant `F7`"),
        ("u8", "unknown variant `u8`"),
        ("", "unknown variant ``"),
        // Another width, and one that does not fill bytes.
        ("F16", "invalid shape"),
        ("F4", "byte boundary"),
    ] {
        let entry = entry("a", "[15]", "[0,15]").replace("U8", dtype);
        assert_refused(&header(&[entry]), part);
    }
    for missing in ["\"dtype\":\"U8\",", "\"shape\":[16],"] {
        let entry = entry("a", "[16]", "[0,16]").replace(missing, "");
        assert_refused(&header(&[entry]), "missing field");
    }
}

/// Other writers list tensors by their names, and fill headers up with spaces.
#[test]
fn tensors_may_be_listed_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(WEIGHTS);
    let entries = [
        entry("b", "[2,4]", "[8,16]"),
        entry("empty", "[0]", "[8,8]"),
        entry("a", "[8]", "[0,8]"),
    ];
    let mut header = header(&entries);
    header.extend(b"       ");
    fs::write(&path, file(&header)).unwrap();
    let mut file = TensorFile::open(&path).unwrap();
    assert_eq!(file.names(), ["a", "b", "empty"]);
    assert_eq!(file.bytes::<1>("a").unwrap(), (DATA[..8].to_vec(), [8]));
    assert_eq!(file.bytes::<2>("b").unwrap(), (DATA[8..].to_vec(), [2, 4]));
    assert_eq!(file.bytes::<1>("empty").unwrap(), (Vec::new(), [0]));
}

#[test]
fn a_tensor_of_another_type_than_a_weight_s_is_refused() {
    const NORM: &str = "model.norm.weight";
    for (dtype, n_bytes, part) in [
        (Dtype::F64, 8, "is F64, not F32, F16 or BF16"),
        (Dtype::F8_E4M3, 1, "is F8_E4M3, not"),
        (Dtype::F8_E5M2, 1, "is F8_E5M2, not"),
        (Dtype::I8, 1, "is I8, not"),
        (Dtype::U8, 1, "is U8, not"),
        (Dtype::BOOL, 1, "is BOOL, not"),
        (Dtype::I32, 4, "is I32, not"),
        (Dtype::I64, 8, "is I64, not"),
    ] {
        let dir = copy(LLAMA);
        change(dir.path(), |_, all| {
            all.insert(NORM.into(), (dtype, vec![64], vec![0; 64 * n_bytes]));
        });
        assert_tensor(&refusal(dir.path()), NORM, part);
    }
}

#[test]
fn a_tensor_of_another_shape_than_a_weight_s_is_refused() {
    let rows: [(&str, &[usize], &str); 7] = [
        ("model.norm.weight", &[], "has the shape []"),
        ("model.norm.weight", &[0], "has the shape [0]"),
        ("model.norm.weight", &[64, 1], "has the shape [64, 1]"),
        ("model.norm.weight", &[63], "asks for [64]"),
        ("model.embed_tokens.weight", &[0, 64], "asks for [256, 64]"),
        (
            "model.embed_tokens.weight",
            &[256, 0],
            "has the shape [256, 0]",
        ),
        ("lm_head.weight", &[64, 256], "has the shape [64, 256]"),
    ];
    for (tensor, shape, part) in rows {
        let dir = copy(LLAMA);
        change(dir.path(), |_, all| {
            let bytes = vec![0; 4 * shape.iter().product::<usize>()];
            all.insert(tensor.into(), (Dtype::F32, shape.into(), bytes));
        });
        assert_tensor(&refusal(dir.path()), tensor, part);
    }
}
