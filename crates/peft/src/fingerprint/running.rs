use serde::{Deserialize, Serialize};

/// The digest after each parameter, as all of them are hashed in turn: the first of them that differs tells
/// which parameter does.
///
/// The first one is of the formats of the layers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Running {
    digests: Vec<u32>,
    /// The names of the parameters, of a model that is at hand.
    names: Vec<String>,
}

impl Running {
    pub(super) fn push(&mut self, name: String, digest: &[u8]) {
        let (digest, _) = digest.split_first_chunk().expect("a digest of 32 bytes");
        self.digests.push(u32::from_be_bytes(*digest));
        self.names.push(name);
    }

    /// What differs first in `found`, in words.
    pub(super) fn first_difference(&self, found: &Self) -> Option<String> {
        let n = self.digests.len().max(found.digests.len());
        let at = (0..n).find(|&at| self.digests.get(at) != found.digests.get(at))?;
        let mut names = [found, self].into_iter();
        Some(match names.find_map(|of| of.names.get(at)) {
            Some(name) => name.clone(),
            None => format!("parameter {at}"),
        })
    }
}

impl From<Running> for String {
    fn from(running: Running) -> Self {
        let digests = running.digests.into_iter();
        digests.map(|digest| format!("{digest:08x}")).collect()
    }
}

impl TryFrom<String> for Running {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let (digits, rest) = text.as_bytes().as_chunks::<8>();
        let digest = |digits: &[u8; 8]| {
            let text = std::str::from_utf8(digits).ok()?;
            let is_plain = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            is_plain.then(|| u32::from_str_radix(text, 16).ok())?
        };
        let digests = digits.iter().map(digest).collect::<Option<Vec<_>>>();
        match digests.filter(|_| rest.is_empty()) {
            Some(digests) => Ok(Self {
                digests,
                names: Vec::new(),
            }),
            None => Err("expected 8 hexadecimal digits for each parameter"),
        }
    }
}
