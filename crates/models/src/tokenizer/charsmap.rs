//! The characters that SentencePiece's normalizer replaces.

/// Checks a `precompiled_charsmap`, and returns the number of bytes of its longest replacement.
///
/// It has the number of bytes of a trie (u32), the trie (a double array of u32, all little-endian),
/// and the replacements, each with a NUL at its end. The crate `tokenizers` allocates the trie before
/// it has read it, and follows its indices unchecked.
pub(super) fn longest_replacement(base64: &str) -> Result<usize, String> {
    let bytes = decode(base64).ok_or("is not in base64")?;
    let (n_bytes, rest) = bytes.split_first_chunk().ok_or("is cut off")?;
    let n_bytes = u32::from_le_bytes(*n_bytes) as usize / 4 * 4;
    let (trie, replacements) = rest.split_at_checked(n_bytes).ok_or_else(|| {
        let n = rest.len();
        format!("states a trie of {n_bytes} bytes, {n} bytes follow")
    })?;
    let replacements = str::from_utf8(replacements).map_err(|error| error.to_string())?;
    let (units, _) = trie.as_chunks();
    let trie: Vec<u32> = units.iter().map(|&unit| u32::from_le_bytes(unit)).collect();
    check_trie(&trie, replacements).ok_or("has an index out of range")?;
    let longest = replacements.split('\0').map(str::len).max();
    Ok(longest.unwrap_or_default())
}

/// Visits all nodes of a trie, and checks that what a byte of a text selects is there.
fn check_trie(trie: &[u32], replacements: &str) -> Option<()> {
    let children = |unit: u32| (unit as usize >> 10) << ((unit & (1 << 9)) >> 6);
    let mut is_known = vec![false; trie.len()];
    let mut nodes = vec![children(*trie.first()?)];
    while let Some(node) = nodes.pop() {
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
                replacements.get(value as usize..)?;
            }
            nodes.push(child);
        }
    }
    Some(())
}

/// Decodes base64 with padding.
fn decode(base64: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits = base64.trim_end_matches('=');
    let n_padding = base64.len() - digits.len();
    if !base64.len().is_multiple_of(4) || n_padding > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(base64.len() / 4 * 3);
    for digits in digits.as_bytes().chunks(4) {
        let mut bits = 0_u32;
        for at in 0..4 {
            let digit = digits.get(at).map_or(Some(0), |&byte| digit(byte))?;
            bits = bits << 6 | u32::from(digit);
        }
        let bits = bits.to_be_bytes();
        let (decoded, rest) = bits.split_at(digits.len());
        if rest.iter().any(|&byte| byte != 0) {
            return None;
        }
        bytes.extend(&decoded[1..]);
    }
    Some(bytes)
}
