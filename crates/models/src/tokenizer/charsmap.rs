//! The characters that SentencePiece's normalizer replaces.

/// Checks a `precompiled_charsmap`, and returns the most by which it multiplies the bytes of a text.
///
/// It has the number of bytes of a trie (u32), the trie (a double array of u32, all little-endian),
/// and the replacements, each with a NUL at its end. The crate `tokenizers` allocates the trie before
/// it has read it, and follows its indices unchecked.
pub(super) fn growth(bytes: &[u8]) -> Result<f64, String> {
    let (n_bytes, rest) = bytes.split_first_chunk().ok_or("is cut off")?;
    let n_bytes = u32::from_le_bytes(*n_bytes) as usize / 4 * 4;
    let (trie, replacements) = rest.split_at_checked(n_bytes).ok_or_else(|| {
        let n = rest.len();
        format!("states a trie of {n_bytes} bytes, {n} bytes follow")
    })?;
    let replacements = str::from_utf8(replacements).map_err(|error| error.to_string())?;
    let (units, _) = trie.as_chunks();
    let trie: Vec<u32> = units.iter().map(|&unit| u32::from_le_bytes(unit)).collect();
    let growth = check_trie(&trie, replacements);
    growth.ok_or_else(|| "has an index out of range".into())
}

/// Visits all nodes of a trie, and checks that what a byte of a text selects is there.
fn check_trie(trie: &[u32], replacements: &str) -> Option<f64> {
    let children = |unit: u32| (unit as usize >> 10) << ((unit & (1 << 9)) >> 6);
    let mut is_known = vec![false; trie.len()];
    let mut nodes = vec![(children(*trie.first()?), 1.0)];
    let mut growth: f64 = 1.0;
    while let Some((node, n_bytes)) = nodes.pop() {
        for byte in 1..=255 {
            let at = node ^ byte;
            let unit = *trie.get(at)?;
            let is_child = (unit & (1 << 31 | 0xff)) as usize == byte;
            if !is_child || std::mem::replace(&mut is_known[at], true) {
                continue;
            }
            let child = at ^ children(unit);
            if unit & (1 << 8) != 0 {
                let value = trie.get(child)? & !(1 << 31);
                let replacement = replacements.get(value as usize..)?.split('\0').next();
                growth = growth.max(replacement.map_or(0, str::len) as f64 / n_bytes);
            }
            nodes.push((child, n_bytes + 1.0));
        }
    }
    Some(growth)
}

/// Decodes base64 with padding.
pub(super) fn decode(base64: &str) -> Result<Vec<u8>, String> {
    let bytes = base64::decode(base64).ok();
    let bytes = bytes.filter(|_| base64.len().is_multiple_of(4));
    bytes.ok_or_else(|| "is not in base64".into())
}

/// Encodes in base64 with padding.
pub(super) fn encode(bytes: &[u8]) -> String {
    base64::encode(bytes)
}
