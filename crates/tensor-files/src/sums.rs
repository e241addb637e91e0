//! The SHA-256 of the files of a directory, in the format of `sha256sum`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::document::open;
use crate::error::{io, refuse};
use crate::{Result, read, write};

/// The file in a directory that lists the SHA-256 of the others.
pub const SUMS: &str = "SHA256SUMS";

/// Lists the SHA-256 of all files of a directory in its [`SUMS`], which `sha256sum --check` reads.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) if a file cannot be read, or the list not be written;
/// [`Error::File`](crate::Error::File) for a directory in it, and for a name with a line break or a
/// backslash, which the format escapes.
pub fn write_sums(dir: &Path) -> Result<()> {
    let mut sums = BTreeMap::new();
    for name in names(dir)? {
        if name.contains(['\n', '\r', '\\']) {
            let problem = "has a line break or a backslash in its name";
            return Err(refuse(&dir.join(name), problem.into()));
        }
        let sum = sha256(&dir.join(&name))?;
        sums.insert(name, sum);
    }
    write(&dir.join(SUMS), lines(&sums).as_bytes())
}

/// Checks the files of a directory against its [`SUMS`], and returns the names of those that are not
/// listed, such as a signature.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) if the list or a file that it names cannot be read,
/// [`Error::File`](crate::Error::File) if the list is damaged or a file has another sum.
pub fn check_sums(dir: &Path) -> Result<Vec<String>> {
    let path = dir.join(SUMS);
    let text = read(&path)?;
    let text = std::str::from_utf8(&text).map_err(|error| refuse(&path, error.to_string()))?;
    let mut listed = BTreeMap::new();
    for (at, line) in text.lines().enumerate() {
        let Some((sum, name)) = entry(line) else {
            let problem = format!("line {} is not a sum and the name of a file", at + 1);
            return Err(refuse(&path, problem));
        };
        if listed.insert(name, sum).is_some() {
            return Err(refuse(&path, format!("lists `{name}` twice")));
        }
    }
    for (name, sum) in &listed {
        let file = dir.join(name);
        let found = sha256(&file)?;
        if found != *sum {
            let problem = format!("is not the file in `{SUMS}`: its SHA-256 is {found}, not {sum}");
            return Err(refuse(&file, problem));
        }
    }
    let mut unlisted = names(dir)?;
    unlisted.retain(|name| !listed.contains_key(name.as_str()));
    Ok(unlisted)
}

/// The SHA-256 of files in memory, as `sha256sum FILES | sha256sum` gives it for them in the order of
/// their names.
pub fn digest<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> String {
    let files = files.into_iter();
    let sums = files.map(|(name, bytes)| (name.to_string(), hex(Sha256::new_with_prefix(bytes))));
    hex(Sha256::new_with_prefix(lines(&sums.collect())))
}

fn lines(sums: &BTreeMap<String, String>) -> String {
    let lines = sums.iter();
    lines
        .map(|(name, sum)| format!("{sum}  {name}\n"))
        .collect()
}

/// The sum and the name of a line.
fn entry(line: &str) -> Option<(&str, &str)> {
    let (sum, name) = line.split_at_checked(64)?;
    // Text and binary mode, which differ on no system with files of bytes.
    let name = name.strip_prefix("  ").or(name.strip_prefix(" *"))?;
    let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    let is_plain = Path::new(name).file_name() == Some(name.as_ref()) && name != SUMS;
    (sum.chars().all(is_hex) && is_plain).then_some((sum, name))
}

/// The names of the files of a directory but the list, in order.
fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(|cause| io(dir, cause))? {
        let entry = entry.map_err(|cause| io(dir, cause))?;
        let name = entry.file_name().into_string();
        let name = name.map_err(|_| refuse(&entry.path(), "has a name that is no UTF-8".into()))?;
        if name != SUMS {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// The SHA-256 of a file, in hexadecimal.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) if it cannot be read, [`Error::File`](crate::Error::File) if it is not a
/// regular file.
pub fn sha256(path: &Path) -> Result<String> {
    let (file, _) = open(path)?;
    hash(file).map_err(|cause| io(path, cause))
}

/// The SHA-256 of all that can be read, in hexadecimal.
pub(crate) fn hash(mut from: impl Read) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(hex(hash)),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn hex(hash: Sha256) -> String {
    let bytes = hash.finalize().into_iter();
    bytes.map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn a_changed_file_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a.txt"), "abc").unwrap();
        fs::write(path("b.txt"), "").unwrap();
        write_sums(dir.path()).unwrap();
        // The sums of FIPS 180-2's first example and of nothing.
        let expected = "\
            ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  a.txt\n\
            e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  b.txt\n";
        assert_eq!(fs::read_to_string(path(SUMS)).unwrap(), expected);
        let in_memory = digest([("b.txt", &b""[..]), ("a.txt", b"abc")]);
        assert_eq!(in_memory, hex(Sha256::new_with_prefix(expected)));
        assert!(check_sums(dir.path()).unwrap().is_empty());
        fs::write(path("SHA256SUMS.asc"), "signed").unwrap();
        assert_eq!(check_sums(dir.path()).unwrap(), ["SHA256SUMS.asc"]);

        for (name, content) in [("a.txt", "abd"), ("b.txt", "a"), (SUMS, "abc"), (SUMS, "é")] {
            let before = fs::read(path(name)).unwrap();
            fs::write(path(name), content).unwrap();
            let error = check_sums(dir.path()).unwrap_err();
            assert!(
                matches!(&error, Error::File { path: at, .. } if *at == path(name)),
                "{error}"
            );
            fs::write(path(name), before).unwrap();
        }
        for line in ["../a.txt", "dir/a.txt", SUMS, "", ".."] {
            fs::write(path(SUMS), format!("{}  {line}\n", "0".repeat(64))).unwrap();
            assert!(
                matches!(check_sums(dir.path()), Err(Error::File { .. })),
                "{line}"
            );
        }
        fs::write(path(SUMS), expected).unwrap();
        fs::remove_file(path("b.txt")).unwrap();
        assert!(matches!(check_sums(dir.path()), Err(Error::Io { .. })));
    }
}
