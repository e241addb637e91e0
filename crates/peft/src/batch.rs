use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::{Error, Result};

/// The documents that sequences are made up of: a token attends to those of its own document, up to itself
/// if the attention is causal.
///
/// Documents follow each other in a sequence. Each token of padding, before or after a document, is a
/// document of its own, which no other token attends to.
#[derive(Clone, Debug)]
pub struct Spans {
    seq: usize,
    documents: Option<Documents>,
    device: Device,
}

/// The document of each token, `[batch, seq]`.
#[derive(Clone, Debug)]
struct Documents {
    /// The index of its first token.
    starts: Tensor<2, Int>,
    /// The index after its last token.
    ends: Tensor<2, Int>,
}

impl Spans {
    /// Sequences of `seq` tokens, each one document.
    pub fn whole(seq: usize, device: &Device) -> Self {
        Self {
            seq,
            documents: None,
            device: device.clone(),
        }
    }

    /// The number of tokens of a sequence.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// The device of the tokens.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The index at which the document of each token begins, `[batch, seq]`; none if each sequence is
    /// one document.
    pub fn starts(&self) -> Option<Tensor<2, Int>> {
        Some(self.documents.as_ref()?.starts.clone())
    }

    /// The index at which the document of each token has ended, `[batch, seq]`: that after its last token.
    /// None if each sequence is one document.
    pub fn ends(&self) -> Option<Tensor<2, Int>> {
        Some(self.documents.as_ref()?.ends.clone())
    }

    /// The position of each token in its document, `[batch, seq]`, or `[1, seq]` if each sequence is one
    /// document.
    pub fn positions(&self) -> Tensor<2, Int> {
        let own = Tensor::<1, Int>::arange(0..self.seq as i64, &self.device).unsqueeze();
        match self.starts() {
            Some(starts) => own - starts,
            None => own,
        }
    }
}

/// Token sequences of one length, `[batch, seq]`, and the targets among them: the tokens that are
/// predicted from those before.
///
/// Targets are all tokens of a document after the first, without padding, or those of them that
/// [`Batch::with_targets`] keeps.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use peft::Batch;
///
/// let tokens = Tensor::<2, Int>::from_data([[5, 6, 7, 0], [1, 2, 3, 4]], &Device::flex());
/// let is_text = [true, true, true, false, true, true, true, true];
/// let batch = Batch::new(tokens.clone())?.with_padding(&is_text)?;
/// assert_eq!(batch.n_targets(), 2 + 3);
/// let ends: Vec<i64> = batch.spans().ends().unwrap().into_data().iter().collect();
/// assert_eq!(ends, [3, 3, 3, 4, 4, 4, 4, 4]);
/// assert!(Batch::new(tokens)?.with_targets(&[false; 8]).is_err());
/// # Ok::<(), peft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Batch {
    tokens: Tensor<2, Int>,
    spans: Spans,
    /// For each token after the first of each sequence, `batch * (seq - 1)`; none if all are targets.
    targets: Option<Vec<bool>>,
    /// For each token, `batch * seq`; none if there is no padding.
    is_text: Option<Vec<bool>>,
}

impl Batch {
    /// Sequences that are one document each, with all tokens after the first as targets.
    ///
    /// # Errors
    /// [`Error::EmptyBatch`] without a sequence, or for sequences of less than two tokens.
    pub fn new(tokens: Tensor<2, Int>) -> Result<Self> {
        let [batch, seq] = tokens.dims();
        if batch == 0 || seq < 2 {
            return Err(Error::EmptyBatch { batch, seq });
        }
        Ok(Self {
            spans: Spans::whole(seq, &tokens.device()),
            tokens,
            targets: None,
            is_text: None,
        })
    }

    /// Cuts the sequences into documents that follow each other. `starts`, `batch * seq`, is the index in
    /// its sequence at which each token's document begins. The first token of a document is not a target.
    ///
    /// # Errors
    /// [`Error::Spans`] if `starts` has another length or no document begins there, or if the batch is cut
    /// into documents already; [`Error::NoTargets`] if no target is left.
    pub fn with_starts(mut self, starts: &[usize]) -> Result<Self> {
        let [batch, seq] = self.tokens.dims();
        self.check_len("starts", starts.len())?;
        if self.spans.documents.is_some() {
            let problem = "the batch is cut into documents already".into();
            return Err(Error::Spans { problem });
        }
        for (row, starts) in starts.chunks_exact(seq).enumerate() {
            for (at, &start) in starts.iter().enumerate() {
                // A document goes on, or begins.
                if start != at && (at == 0 || start != starts[at - 1]) {
                    let problem = format!("token {at} of sequence {row} has the start {start}");
                    return Err(Error::Spans { problem });
                }
            }
        }
        let ends = starts.chunks_exact(seq).flat_map(ends);
        let tensor = |bounds: Vec<i64>| {
            let bounds = TensorData::new(bounds, [batch, seq]);
            Tensor::from_data(bounds, &self.tokens.device())
        };
        self.spans.documents = Some(Documents {
            starts: tensor(starts.iter().map(|&start| start as i64).collect()),
            ends: tensor(ends.map(|end| end as i64).collect()),
        });
        self.keep_targets(|token| starts[token] != token % seq)
    }

    /// The SHA-256 of tokens, documents, padding and targets, in hexadecimal.
    pub fn sha256(&self) -> String {
        let words = |values: Tensor<2, Int>| -> Vec<u8> {
            let values = values.into_data().convert::<i64>();
            let values = values.as_slice::<i64>().expect("converted to i64");
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect()
        };
        let flags = |flags: &Option<Vec<bool>>| -> Vec<u8> {
            let flags = flags.iter().flatten();
            flags.map(|&flag| flag.into()).collect()
        };
        let [batch, seq] = self.tokens.dims();
        let dims: Vec<u8> = [batch, seq]
            .into_iter()
            .flat_map(usize::to_le_bytes)
            .collect();
        let starts = self.spans.starts().map(words).unwrap_or_default();
        let (targets, is_text) = (flags(&self.targets), flags(&self.is_text));
        tensor_files::digest([
            ("dims", dims.as_slice()),
            ("is_text", &is_text),
            ("starts", &starts),
            ("targets", &targets),
            ("tokens", &words(self.tokens.clone())),
        ])
    }

    /// Marks padding: `is_text`, `batch * seq`, is the attention mask of other programs, false for padding
    /// before or after a document. Padding is not a target, no other token attends to it, and a calibration
    /// leaves it out. Without [`Batch::with_starts`] a sequence has one document.
    ///
    /// # Errors
    /// [`Error::Spans`] if `is_text` has another length, or there is padding within a document;
    /// [`Error::NoTargets`] if no target is left.
    pub fn with_padding(self, is_text: &[bool]) -> Result<Self> {
        let [_, seq] = self.tokens.dims();
        self.check_len("marks", is_text.len())?;
        let mut batch = match self.spans.starts() {
            Some(_) => self,
            None => {
                let mut starts = Vec::with_capacity(is_text.len());
                for (row, marks) in is_text.chunks_exact(seq).enumerate() {
                    let (begins, n_documents) = runs(marks);
                    if n_documents > 1 {
                        let problem =
                            format!("there is padding within the document of sequence {row}");
                        return Err(Error::Spans { problem });
                    }
                    starts.extend(begins);
                }
                self.with_starts(&starts)?
            }
        };
        let starts = batch.spans.starts().expect("given above");
        let starts = starts.into_data().convert::<i64>();
        let starts = starts.as_slice::<i64>().expect("converted to i64");
        let rows = starts.chunks_exact(seq).zip(is_text.chunks_exact(seq));
        for (row, (starts, marks)) in rows.enumerate() {
            for (at, (&start, &mark)) in starts.iter().zip(marks).enumerate() {
                if mark != marks[start as usize] {
                    let problem =
                        format!("the document of token {at} of sequence {row} is padding in part");
                    return Err(Error::Spans { problem });
                }
            }
        }
        batch.is_text = Some(is_text.to_vec());
        batch.keep_targets(|token| is_text[token])
    }

    /// Keeps the targets for which `is_target`, `batch * seq`, is true.
    ///
    /// # Errors
    /// [`Error::Spans`] if `is_target` has another length, [`Error::NoTargets`] if none is left.
    pub fn with_targets(self, is_target: &[bool]) -> Result<Self> {
        self.check_len("marks", is_target.len())?;
        self.keep_targets(|token| is_target[token])
    }

    /// Keeps the targets whose token, `0 .. batch * seq`, is kept.
    fn keep_targets(self, is_kept: impl Fn(usize) -> bool) -> Result<Self> {
        let dims @ [_, seq] = self.tokens.dims();
        let mut kept = self.targets();
        for (at, kept) in kept.iter_mut().enumerate() {
            *kept &= is_kept(at / (seq - 1) * seq + at % (seq - 1) + 1);
        }
        self.put_targets(kept, dims)
    }

    fn check_len(&self, what: &str, found: usize) -> Result<()> {
        let [batch, seq] = self.tokens.dims();
        if found == batch * seq {
            return Ok(());
        }
        Err(Error::Spans {
            problem: format!("{found} {what} for {batch} sequences of {seq} tokens"),
        })
    }

    fn put_targets(mut self, targets: Vec<bool>, [batch, seq]: [usize; 2]) -> Result<Self> {
        if !targets.contains(&true) {
            return Err(Error::NoTargets { batch, seq });
        }
        self.targets = Some(targets);
        Ok(self)
    }

    /// The tokens, `[batch, seq]`.
    pub fn tokens(&self) -> Tensor<2, Int> {
        self.tokens.clone()
    }

    /// The documents of the sequences.
    pub fn spans(&self) -> &Spans {
        &self.spans
    }

    /// Whether some tokens are padding.
    pub fn is_padded(&self) -> bool {
        self.is_text
            .as_ref()
            .is_some_and(|marks| marks.contains(&false))
    }

    /// Whether each token after the first of its sequence is a target, `batch * (seq - 1)`, row by row.
    pub fn targets(&self) -> Vec<bool> {
        let [batch, seq] = self.tokens.dims();
        let all = || vec![true; batch * (seq - 1)];
        self.targets.clone().unwrap_or_else(all)
    }

    /// The batch of one of the sequences.
    ///
    /// # Errors
    /// [`Error::NoTargets`] if it has no target.
    ///
    /// # Panics
    /// If there is no sequence `at`.
    pub fn sequence(&self, at: usize) -> Result<Self> {
        let [_, seq] = self.tokens.dims();
        let part = |marks: &Vec<bool>, n: usize| marks[at * n..(at + 1) * n].to_vec();
        let one = Self {
            tokens: self.tokens().narrow(0, at, 1),
            spans: Spans {
                documents: self.spans.documents.as_ref().map(|all| Documents {
                    starts: all.starts.clone().narrow(0, at, 1),
                    ends: all.ends.clone().narrow(0, at, 1),
                }),
                ..self.spans.clone()
            },
            is_text: self.is_text.as_ref().map(|marks| part(marks, seq)),
            targets: None,
        };
        match &self.targets {
            Some(marks) => one.put_targets(part(marks, seq - 1), [1, seq]),
            None => Ok(one),
        }
    }

    /// The tokens of each document of at least two, without padding.
    pub(crate) fn documents(&self) -> Vec<Vec<i64>> {
        let values = |values: Tensor<2, Int>| {
            let values = values.into_data().convert::<i64>();
            values.try_into_vec::<i64>().expect("converted to i64")
        };
        let [_, seq] = self.tokens.dims();
        let tokens = values(self.tokens());
        let starts = self.spans.starts().map(values);
        let rows = tokens.chunks_exact(seq).enumerate();
        let documents = rows.flat_map(|(row, tokens)| {
            let starts = starts.as_ref().map(|of| &of[row * seq..(row + 1) * seq]);
            let mut begins: Vec<usize> = match starts {
                Some(starts) => (0..seq).filter(|&at| starts[at] == at as i64).collect(),
                None => vec![0],
            };
            begins.push(seq);
            let documents = begins.windows(2).map(|of| tokens[of[0]..of[1]].to_vec());
            documents.collect::<Vec<_>>()
        });
        documents.filter(|document| document.len() > 1).collect()
    }

    /// The indices of the targets among all tokens after the first of their sequences, row by row; none
    /// if all are targets.
    pub(crate) fn target_rows(&self) -> Option<Tensor<1, Int>> {
        let rows = (0i64..).zip(self.targets.as_ref()?);
        let rows: Vec<i64> = rows.filter(|(_, is)| **is).map(|(row, _)| row).collect();
        Some(Tensor::from_data(rows.as_slice(), &self.tokens.device()))
    }

    /// `values`, `[batch, seq - 1]`, of each token after the first, with zeros where it is not a target.
    pub fn of_targets(&self, values: Tensor<2>) -> Tensor<2> {
        let Some(targets) = &self.targets else {
            return values;
        };
        let marks: Vec<f32> = targets.iter().map(|&mark| f32::from(mark)).collect();
        let place = (&values.device(), values.dtype());
        let marks = TensorData::new(marks, values.dims());
        values * Tensor::from_data(marks, place)
    }

    /// The rows of `x`, `[batch, seq, d]`, without those of padding: `[n_tokens, d]`.
    pub fn of_text(&self, x: Tensor<3>) -> Tensor<2> {
        let [batch, seq, d] = x.dims();
        let x = x.reshape([batch * seq, d]);
        let Some(is_text) = &self.is_text else {
            return x;
        };
        let rows = (0i64..).zip(is_text).filter(|(_, is_text)| **is_text);
        let rows: Vec<i64> = rows.map(|(row, _)| row).collect();
        let rows = Tensor::<1, Int>::from_data(rows.as_slice(), &x.device());
        x.select(0, rows)
    }

    /// The number of targets; at least one.
    pub fn n_targets(&self) -> usize {
        let [batch, seq] = self.tokens.dims();
        match &self.targets {
            Some(targets) => targets.iter().filter(|&&is_target| is_target).count(),
            None => batch * (seq - 1),
        }
    }
}

/// The index at which the document of each token of a sequence has ended.
fn ends(starts: &[usize]) -> Vec<usize> {
    let documents = starts.chunk_by(|a, b| a == b);
    let ends = documents.scan(0, |end, document| {
        *end += document.len();
        Some(vec![*end; document.len()])
    });
    ends.flatten().collect()
}

/// The index at which the document of each mark begins, and the number of documents.
fn runs(marks: &[bool]) -> (Vec<usize>, usize) {
    let (mut start, mut n_documents) = (0, usize::from(marks[0]));
    let begins = marks.iter().enumerate().map(|(at, mark)| {
        if at > 0 && *mark != marks[at - 1] {
            start = at;
            n_documents += usize::from(*mark);
        }
        // Each token of padding by itself: however many there are, they are no long document.
        if *mark { start } else { at }
    });
    (begins.collect(), n_documents)
}
