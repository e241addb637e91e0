use std::fs::File;
use std::io::Read;

use serde_json::json;

use super::*;
use crate::testing::file;

fn read(content: impl AsRef<[u8]>) -> Result<Vec<Record>> {
    let (_dir, path) = file("data.jsonl", content);
    read_records(&path)
}

/// Lines and values of field `a`.
fn values(content: impl AsRef<[u8]>) -> Vec<(usize, Value)> {
    let records = read(content).unwrap();
    let value = |record: Record| (record.line, record.fields["a"].clone());
    records.into_iter().map(value).collect()
}

#[test]
fn lines_with_a_mark_windows_ends_and_blanks() {
    let content = "\u{feff}{\"a\": 1}\r\n\r\n   \n{\"a\": \"\u{feff}é\\r\\n\"}\r\n{\"a\": null}";
    let expected = [(1, json!(1)), (4, json!("\u{feff}é\r\n")), (5, json!(null))];
    assert_eq!(values(content), expected);
}

/// Each record has the line on which it begins.
#[test]
fn an_array_of_objects() {
    let content = "\u{feff}\n[\r\n  {\"a\": 1},\n {\n\"a\": [2]\n}, {\"a\": 3}\n]\n \n";
    assert_eq!(
        values(content),
        [(3, json!(1)), (4, json!([2])), (6, json!(3))]
    );
    assert_eq!(values("[{\"a\":1}]"), [(1, json!(1))]);
}

#[test]
fn records_know_their_file() {
    let (_dir, path) = file("data.jsonl", "{\"a\": 1}\n");
    assert_eq!(&*read_records(&path).unwrap()[0].path, &*path);
}

#[test]
fn files_without_a_record() {
    for content in ["", "\u{feff}", " \n\r\n", "[]", "\n[ ]\n"] {
        assert!(
            matches!(read(content), Err(Error::NoRecords { .. })),
            "{content:?}"
        );
    }
}

#[test]
fn a_line_that_is_not_json() {
    let error = read("{\"a\": 1}\n\n{\"a\": 1, b}\n{}").unwrap_err();
    assert!(
        matches!(&error, Error::Record { line: 3, problem: RecordError::NotJson { column: 10, problem }, .. }
        if problem == "key must be a string")
    );
    // A record over several lines, and two records on one line.
    let error = read("{\n\"a\": 1}\n").unwrap_err().to_string();
    assert!(
        error.ends_with("data.jsonl`, line 1: invalid JSON at column 1: EOF while parsing an object; expected one JSON object per line, or an array of objects"),
        "{error}"
    );
    assert!(matches!(
        read("{\n\"a\": 1}\n"),
        Err(Error::Record {
            line: 1,
            problem: RecordError::NotJson { .. },
            ..
        })
    ));
    assert!(matches!(
        read("{} {}\n"),
        Err(Error::Record {
            line: 1,
            problem: RecordError::NotJson { column: 4, .. },
            ..
        })
    ));
}

#[test]
fn an_array_that_is_not_json() {
    let error = read("[{\"a\": 1},\n {\"a\" 2}]").unwrap_err();
    assert!(
        matches!(
            error,
            Error::Record {
                line: 2,
                problem: RecordError::NotJson { column: 7, .. },
                ..
            }
        ),
        "{error}"
    );
    let cut = read("[{\"a\": 1},\n {\"a\": 2},").unwrap_err();
    assert!(
        matches!(
            cut,
            Error::Record {
                line: 2,
                problem: RecordError::NotJson { .. },
                ..
            }
        ),
        "{cut}"
    );
    let more = read("[{\"a\": 1}]\n{\"a\": 2}").unwrap_err();
    assert!(
        matches!(
            more,
            Error::Record {
                line: 2,
                problem: RecordError::NotJson { column: 1, .. },
                ..
            }
        ),
        "{more}"
    );
}

#[test]
fn values_that_are_not_objects() {
    let line = read("{\"a\": 1}\n\"a\"\n").unwrap_err();
    assert!(matches!(
        line,
        Error::Record {
            line: 2,
            problem: RecordError::NotObject { found: "a string" },
            ..
        }
    ));
    let element = read("[{\"a\": 1},\n\n [1]]").unwrap_err();
    assert!(matches!(
        element,
        Error::Record {
            line: 3,
            problem: RecordError::NotObject { found: "an array" },
            ..
        }
    ));
    let error = read("17").unwrap_err().to_string();
    assert!(
        error
            .ends_with("data.jsonl`, line 1: expected an object with named fields, found a number")
    );
}

/// The place is that of the first byte that is none of a character.
#[test]
fn bytes_that_are_not_utf8() {
    let cases: [(&[u8], [usize; 3]); 6] = [
        (b"{\"a\": \"\xc3\xa9\"}\n{\"a\": \"\xe9\"}\n", [2, 8, 19]),
        (b"\xef\xbb\xbf{\"a\": \"\xe9\"}\n", [1, 8, 10]),
        (b"[{\"a\": \"\xc3\xa9\"},\n{\"a\": \"\xe9\"}]", [2, 8, 21]),
        (b"\xef\xbb\xbf[{\"a\": \"\xc3\xa9\xe2\x82\"}]", [1, 11, 13]),
        (b"[{\"a\": \"\xe9\n\"}]", [1, 9, 8]),
        (b"[\n\xff{\"a\": 1}]", [2, 1, 2]),
    ];
    for (content, [at_line, at_column, at_offset]) in cases {
        let error = read(content).unwrap_err();
        let problem = RecordError::NotUtf8 {
            column: at_column,
            offset: at_offset,
        };
        assert!(
            matches!(&error, Error::Record { line, problem: found, .. }
            if *line == at_line && *found == problem),
            "{error}"
        );
    }
}

/// A sparse file of a terabyte without a line feed, of which only the allowed size is read.
#[test]
fn a_line_that_does_not_end() {
    let (_dir, path) = file("data.jsonl", "{}\n");
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let error = read_records(&path).unwrap_err();
    assert!(matches!(
        error,
        Error::Record {
            line: 2,
            problem: RecordError::TooLarge {
                max: MAX_RECORD_BYTES
            },
            ..
        }
    ));
}

#[test]
fn the_limit_of_a_record_is_exact() {
    const MAX: usize = 100;
    let record = |len: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(len - 8));
    let read = |content: String| {
        let (_dir, path) = file("data.jsonl", content);
        read_up_to(&path, MAX)
    };
    let fits = record(MAX);
    for content in [fits.clone(), format!("{fits}\n{{\"a\":1}}\n")] {
        assert!(read(content).is_ok());
    }
    for content in [record(MAX + 1), record(MAX + 1) + "\n"] {
        assert!(matches!(
            read(content),
            Err(Error::Record {
                line: 1,
                problem: RecordError::TooLarge { max: MAX },
                ..
            })
        ));
    }
    // An array may be longer than a record.
    let array = format!("[{fits},\n{fits}]");
    assert_eq!(read(array).unwrap().len(), 2);
    let long = format!("[{fits},\n{{\"a\":\n\"{}\"}}]", "x".repeat(MAX));
    assert!(matches!(
        read(long),
        Err(Error::Record {
            line: 2,
            problem: RecordError::TooLarge { .. },
            ..
        })
    ));
}

#[test]
fn a_record_of_an_array_that_does_not_end() {
    let path = Path::new("data.json");
    let bytes = io::Cursor::new(b"[{}, {\"a\": \"").chain(io::repeat(b'x'));
    let error = json::array(bytes, path, 0, 1000).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Record {
                line: 1,
                problem: RecordError::TooLarge { max: 1000 },
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn files_that_are_something_else() {
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n";
    let cases: [(&[u8], &str); 6] = [
        (lfs.as_bytes(), "a Git LFS pointer"),
        (
            b"/annex/objects/SHA256E-s12--00.jsonl\n",
            "a git-annex pointer",
        ),
        (b"\n <!DOCTYPE html>\n<html>", "an HTML page"),
        (b"\xef\xbb\xbf<html lang=\"en\">", "an HTML page"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip"),
        (b"\xff\xfe{\x00}\x00", "UTF-16"),
    ];
    for (content, what) in cases {
        let error = read(content).unwrap_err();
        assert!(
            matches!(error, Error::NotRecords { found, .. } if found == what),
            "{error}"
        );
    }
    let error = read(lfs).unwrap_err().to_string();
    assert!(
        error.ends_with("data.jsonl` is a Git LFS pointer, expected records; run `git lfs pull`")
    );
}

#[test]
fn paths_that_are_not_files() {
    let dir = tempfile::tempdir().unwrap();
    let error = read_records(dir.path()).unwrap_err();
    assert!(matches!(
        error,
        Error::NotRecords {
            found: "a directory",
            ..
        }
    ));
    let missing = read_records(&dir.path().join("data.jsonl")).unwrap_err();
    assert!(matches!(
        missing,
        Error::File(tensor_files::Error::Io { .. })
    ));
}

/// No process writes to the pipe: opening it would block.
#[cfg(unix)]
#[test]
fn a_pipe_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    let made = std::process::Command::new("mkfifo")
        .arg(&path)
        .status()
        .unwrap();
    assert!(made.success());
    let error = read_records(&path).unwrap_err();
    assert!(matches!(
        error,
        Error::NotRecords {
            found: "a pipe or a device",
            ..
        }
    ));
}

/// Deep nesting is an error instead of a stack overflow.
#[test]
fn deep_nesting() {
    let deep = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(matches!(
        read(&deep),
        Err(Error::Record {
            line: 1,
            problem: RecordError::NotJson { .. },
            ..
        })
    ));
    assert!(matches!(
        read("[".repeat(100_000)),
        Err(Error::Record {
            problem: RecordError::NotJson { .. },
            ..
        })
    ));
}

/// The keys of an object are in the order of the file.
#[test]
fn keys_keep_their_order() {
    let records = read("{\"b\": {\"z\": 1, \"y\": 2}, \"a\": 3}").unwrap();
    let keys: Vec<_> = records[0].fields.keys().collect();
    assert_eq!(keys, ["b", "a"]);
    assert_eq!(records[0].fields["b"].to_string(), "{\"z\":1,\"y\":2}");
}

fn table(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<(usize, Value)>> {
    let (_dir, path) = file(name, content);
    let records = read_records(&path)?.into_iter();
    Ok(records
        .map(|record| (record.line, Value::Object(record.fields)))
        .collect())
}

/// Compared with `csv.DictReader` of Python.
#[test]
fn tables_of_texts() {
    let content = "\u{feff}question,answer\r\n\"a, \"\"b\"\"\nc\",1\r\n\r\né, x \r\n";
    let expected = [
        (2, json!({"question": "a, \"b\"\nc", "answer": "1"})),
        (5, json!({"question": "é", "answer": " x "})),
    ];
    assert_eq!(table("data.CSV", content).unwrap(), expected);
    let tabs = table("data.tsv", "a\tb\n1,2\t\n").unwrap();
    assert_eq!(tabs, [(2, json!({"a": "1,2", "b": ""}))]);
    assert!(matches!(
        table("a.csv", "a,b\n"),
        Err(Error::NoRecords { .. })
    ));
}

#[test]
fn rows_that_are_refused() {
    let cases: [(&[u8], usize, &str); 4] = [
        (
            b"a,b\n1,2\n3\n",
            3,
            "1 fields, but the first line names 2 columns",
        ),
        (
            b"a,b\n\"1\n\",2\n3,4,5\n",
            4,
            "3 fields, but the first line names 2 columns",
        ),
        (b"a,a\n1,2\n", 1, "two columns are named `a`"),
        (
            b"a,b\n1,\xe9\n",
            2,
            "`b` is not UTF-8; save the file as UTF-8",
        ),
    ];
    for (content, at_line, expected) in cases {
        let error = table("data.csv", content).unwrap_err();
        assert!(
            matches!(&error, Error::Record { line, problem: RecordError::Row { problem }, .. }
                if *line == at_line && problem == expected),
            "{error}"
        );
    }
    let open = [b"a\n1\n\"".as_slice(), &[b'x'; 50_000]].concat();
    let (_dir, path) = file("data.csv", open);
    let error = read_up_to(&path, 1000).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Record {
                line: 3,
                problem: RecordError::TooLarge { max: 1000 },
                ..
            }
        ),
        "{error}"
    );
}

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

#[cfg(not(feature = "parquet"))]
#[test]
fn parquet_is_a_feature() {
    let error = read_records(&golden("rows_snappy.parquet")).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("build with the feature `parquet`"),
        "{error}"
    );
}

/// The rows are those that pyarrow wrote.
#[cfg(feature = "parquet")]
#[test]
fn rows_of_parquet() {
    let rows: Value = serde_json::from_slice(&std::fs::read(golden("rows.json")).unwrap()).unwrap();
    for name in ["rows_snappy.parquet", "rows_none.parquet"] {
        let records = read_records(&golden(name)).unwrap();
        assert_eq!(
            records.iter().map(|record| record.line).collect::<Vec<_>>(),
            [1, 2, 3]
        );
        let found: Vec<_> = records
            .into_iter()
            .map(|record| Value::Object(record.fields))
            .collect();
        // As text, in which the order of keys counts.
        assert_eq!(Value::Array(found).to_string(), rows.to_string());
    }
    let refused = [
        (
            "rows_zstd.parquet",
            "of the codecs, Snappy is read; write the file with it",
        ),
        ("bytes.parquet", "`image` is of bytes, not of text"),
    ];
    for (name, expected) in refused {
        let error = read_records(&golden(name)).unwrap_err().to_string();
        assert!(
            error.contains("line 1: ") && error.ends_with(expected),
            "{error}"
        );
    }
}

/// Files of which any byte is another, or whose end is missing, are read or refused.
#[cfg(feature = "parquet")]
#[test]
fn damaged_parquet() {
    let whole = std::fs::read(golden("rows_snappy.parquet")).unwrap();
    let (_dir, path) = file("data.parquet", &whole);
    let mut n_refused = 0;
    for at in 4..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x55;
        for bytes in [&damaged, &whole[..at]] {
            std::fs::write(&path, bytes).unwrap();
            n_refused += usize::from(read_records(&path).is_err());
        }
    }
    assert!(n_refused > whole.len());
}
