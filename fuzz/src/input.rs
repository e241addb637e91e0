//! Files from the bytes of an input.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tensor_files::TensorFile;

/// Separates the files of an input.
pub const SEPARATOR: &[u8] = b"\n====\n";

/// More bytes of tensors are not made from an input.
const MAX_TENSORS: usize = 1 << 18;

/// The parts of an input.
pub(crate) fn parts(mut data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut is_done = false;
    std::iter::from_fn(move || {
        if is_done {
            return None;
        }
        let windows = data.windows(SEPARATOR.len());
        let at = windows.into_iter().position(|window| window == SEPARATOR);
        let (part, rest) = match at {
            Some(at) => (&data[..at], &data[at + SEPARATOR.len()..]),
            None => (data, &[][..]),
        };
        is_done = at.is_none();
        data = rest;
        Some(part)
    })
}

/// The folder of this process, which all inputs reuse.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("fuzz-{}", std::process::id()));
        fs::create_dir_all(folder.join("input")).expect("a folder for the files");
        folder
    })
}

/// A path at which nothing is.
pub(crate) fn output() -> PathBuf {
    let path = folder().join("output");
    let removed = match fs::metadata(&path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(&path),
        Ok(_) => fs::remove_file(&path),
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    }
    path
}

/// Writes one file.
pub(crate) fn place(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join("input").join(name);
    fs::write(&path, bytes).expect("a file in the folder");
    path
}

/// Writes the parts of an input as the files of these names, and returns their directory. Parts that
/// are missing or empty are no files. A file of tensors is made from the text of [`tensors_text`];
/// there is no directory if it would be large.
pub(crate) fn write(names: &[&str], data: &[u8]) -> Option<PathBuf> {
    let mut parts = parts(data);
    for name in names {
        let part = parts.next().unwrap_or_default();
        if part.is_empty() {
            let _ = fs::remove_file(folder().join("input").join(name));
        } else if name.ends_with(".safetensors") {
            place(name, &tensors(part)?);
        } else {
            place(name, part);
        }
    }
    Some(folder().join("input"))
}

/// A safetensors file from lines `NAME DTYPE SHAPE BYTES`, so that a change to one tensor leaves the
/// offsets of the others right.
///
/// The shape is sizes between commas, or `*` for all bytes in one dimension. The bytes are hexadecimal
/// and repeat as often as the shape needs, or they are a text that begins with `{`.
fn tensors(text: &[u8]) -> Option<Vec<u8>> {
    let mut header = Vec::new();
    let mut data: Vec<u8> = Vec::new();
    for line in text
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let mut fields = line.splitn(4, |&byte| byte == b' ');
        let mut field = || fields.next().unwrap_or_default();
        let [name, dtype, shape] = [field(), field(), field()].map(String::from_utf8_lossy);
        let bytes = field();
        let bytes = if bytes.starts_with(b"{") {
            bytes.to_vec()
        } else {
            from_hex(bytes)
        };
        let size = match &*dtype {
            "U8" | "I8" | "BOOL" | "F8_E4M3" => 1,
            "F16" | "BF16" | "I16" | "U16" => 2,
            "F64" | "I64" | "U64" => 8,
            _ => 4,
        };
        let shape: Vec<usize> = match &*shape {
            "*" => vec![bytes.len() / size],
            sizes => sizes
                .split(',')
                .filter_map(|size| size.parse().ok())
                .collect(),
        };
        let n = shape
            .iter()
            .try_fold(size, |n, &size| n.checked_mul(size))?;
        let start = data.len();
        if n > MAX_TENSORS - start.min(MAX_TENSORS) {
            return None;
        }
        let pattern = if bytes.is_empty() { &[0][..] } else { &bytes };
        data.extend(pattern.iter().cycle().take(n));
        header.push(format!(
            "{}:{{\"dtype\":{},\"shape\":{shape:?},\"data_offsets\":[{start},{}]}}",
            serde_json::Value::from(&*name),
            serde_json::Value::from(&*dtype),
            data.len(),
        ));
    }
    let header = format!("{{{}}}", header.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    Some(file)
}

fn from_hex(text: &[u8]) -> Vec<u8> {
    let digits = text
        .iter()
        .filter_map(|&digit| char::from(digit).to_digit(16));
    let digits: Vec<u8> = digits.map(|digit| digit as u8).collect();
    let (pairs, _) = digits.as_chunks::<2>();
    pairs.iter().map(|[high, low]| high << 4 | low).collect()
}

/// The file of tensors that a target makes from lines.
///
/// # Panics
/// If it would be large.
pub fn tensors_file(text: &[u8]) -> Vec<u8> {
    tensors(text).expect("a small file")
}

/// The lines from which a target makes the file of tensors at `path` again.
///
/// # Panics
/// If it is no file of tensors of the types that this workspace writes.
pub fn tensors_text(path: &Path) -> Vec<u8> {
    let file = fs::read(path).expect("a file");
    let n_header = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let (header, data) = file[8..].split_at(n_header);
    let header: serde_json::Value = serde_json::from_slice(header).expect("a header");
    let names = TensorFile::open(path).expect("a file of tensors").names();
    let mut text = Vec::new();
    for name in names {
        let tensor = &header[&name];
        let end = |at: usize| tensor["data_offsets"][at].as_u64().expect("an offset") as usize;
        let bytes = &data[end(0)..end(1)];
        let sizes: Vec<usize> = serde_json::from_value(tensor["shape"].clone()).expect("a shape");
        let dtype = tensor["dtype"].as_str().expect("a type");
        if dtype == "U8" && bytes.starts_with(b"{") {
            text.extend(format!("{name} {dtype} * ").bytes());
            text.extend(bytes);
        } else {
            let sizes: Vec<String> = sizes.iter().map(usize::to_string).collect();
            text.extend(format!("{name} {dtype} {} ", sizes.join(",")).bytes());
            let repeats = |&n: &usize| bytes.chunks(n).all(|part| bytes.starts_with(part));
            let period = (4..bytes.len()).find(repeats).unwrap_or(bytes.len());
            text.extend(
                bytes[..period]
                    .iter()
                    .flat_map(|byte| format!("{byte:02x}").into_bytes()),
            );
        }
        text.push(b'\n');
    }
    text
}
