use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::{Error, Result};

/// Which tokens of some sequences make up a text: a token sees those of its own text up to itself.
///
/// Texts lie one after the other. Each token that fills a sequence up, before or after its text, is one
/// more of them, which no other token sees.
#[derive(Clone, Debug)]
pub struct Spans {
    seq: usize,
    starts: Option<Tensor<2, Int>>,
    device: Device,
}

impl Spans {
    /// Sequences of `seq` tokens, each one text.
    pub fn whole(seq: usize, device: &Device) -> Self {
        Self {
            seq,
            starts: None,
            device: device.clone(),
        }
    }

    /// Tokens of a sequence.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// The device of the tokens.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Where in its sequence the text of each token begins, `[batch, seq]`; none if each sequence is
    /// one text.
    pub fn starts(&self) -> Option<Tensor<2, Int>> {
        self.starts.clone()
    }

    /// The place of each token in its text, `[batch, seq]`, or `[1, seq]` if each sequence is one.
    pub fn positions(&self) -> Tensor<2, Int> {
        let own = Tensor::<1, Int>::arange(0..self.seq as i64, &self.device).unsqueeze();
        match self.starts() {
            Some(starts) => own - starts,
            None => own,
        }
    }
}

/// Sequences of one length, `[batch, seq]`, whose tokens are to be predicted from those before: all
/// after the first, or those that [`Batch::with_targets`] says.
#[derive(Clone, Debug)]
pub struct Batch {
    tokens: Tensor<2, Int>,
    spans: Spans,
    /// For each token after the first of each sequence, `batch * (seq - 1)`; none if it is all.
    targets: Option<Vec<bool>>,
    /// For each token, `batch * seq`; none if all are.
    is_text: Option<Vec<bool>>,
}

impl Batch {
    /// Sequences each of which is one text, all of it to be predicted.
    ///
    /// # Errors
    /// [`Error::EmptyBatch`] unless there is a sequence of two tokens.
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

    /// The sequences as several texts one after the other: `starts`, `batch * seq`, says for each token
    /// where in its sequence its text begins. The first token of a text is not predicted.
    ///
    /// # Errors
    /// [`Error::Spans`] if `starts` has another length or is not the beginning of texts, or if the batch
    /// is cut into texts already; [`Error::NoTargets`] if nothing is left to predict.
    pub fn with_starts(mut self, starts: &[usize]) -> Result<Self> {
        let [batch, seq] = self.tokens.dims();
        self.check_len("starts", starts.len())?;
        if self.spans.starts.is_some() {
            let problem = "the batch is cut into texts already".into();
            return Err(Error::Spans { problem });
        }
        for (row, starts) in starts.chunks_exact(seq).enumerate() {
            for (at, &start) in starts.iter().enumerate() {
                // A text goes on, or begins.
                if start != at && (at == 0 || start != starts[at - 1]) {
                    let problem = format!("token {at} of sequence {row} has the start {start}");
                    return Err(Error::Spans { problem });
                }
            }
        }
        let values: Vec<i64> = starts.iter().map(|&start| start as i64).collect();
        let values = TensorData::new(values, [batch, seq]);
        self.spans.starts = Some(Tensor::from_data(values, &self.tokens.device()));
        self.keep_targets(|token| starts[token] != token % seq)
    }

    /// What the tokens are beside texts: `is_text`, `batch * seq`, is false for those that fill a
    /// sequence up, before its text or after (the attention mask of other programs). These are not
    /// predicted, nothing sees them, and no calibration counts them. Without
    /// [`Batch::with_starts`] a sequence has one text.
    ///
    /// # Errors
    /// [`Error::Spans`] if `is_text` has another length, or a text is interrupted,
    /// [`Error::NoTargets`] if nothing is left to predict.
    pub fn with_padding(self, is_text: &[bool]) -> Result<Self> {
        let [_, seq] = self.tokens.dims();
        self.check_len("marks", is_text.len())?;
        let mut batch = match self.spans.starts() {
            Some(_) => self,
            None => {
                let mut starts = Vec::with_capacity(is_text.len());
                for (row, marks) in is_text.chunks_exact(seq).enumerate() {
                    let (begins, n_texts) = runs(marks);
                    if n_texts > 1 {
                        let problem = format!("the text of sequence {row} is interrupted");
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
                    let problem = format!("token {at} of sequence {row} is unlike its text");
                    return Err(Error::Spans { problem });
                }
            }
        }
        batch.is_text = Some(is_text.to_vec());
        batch.keep_targets(|token| is_text[token])
    }

    /// Only the tokens are to be predicted for which `is_target`, `batch * seq`, is true, of those
    /// that are predicted at all.
    ///
    /// # Errors
    /// [`Error::Spans`] if `is_target` has another length, [`Error::NoTargets`] if nothing is left.
    pub fn with_targets(self, is_target: &[bool]) -> Result<Self> {
        self.check_len("marks", is_target.len())?;
        self.keep_targets(|token| is_target[token])
    }

    /// Of the targets those for whose token, `0 .. batch * seq`, it is said.
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
        match found == batch * seq {
            true => Ok(()),
            false => Err(Error::Spans {
                problem: format!("{found} {what} for {batch} sequences of {seq} tokens"),
            }),
        }
    }

    fn put_targets(mut self, targets: Vec<bool>, [batch, seq]: [usize; 2]) -> Result<Self> {
        if !targets.contains(&true) {
            return Err(Error::NoTargets { batch, seq });
        }
        self.targets = Some(targets);
        Ok(self)
    }

    /// `[batch, seq]`.
    pub fn tokens(&self) -> Tensor<2, Int> {
        self.tokens.clone()
    }

    /// Which tokens make up a text.
    pub fn spans(&self) -> &Spans {
        &self.spans
    }

    /// Whether some tokens only fill sequences up.
    pub fn is_padded(&self) -> bool {
        self.is_text
            .as_ref()
            .is_some_and(|marks| marks.contains(&false))
    }

    /// Whether each token after the first of its sequence is to be predicted, `batch * (seq - 1)`, row
    /// by row.
    pub fn targets(&self) -> Vec<bool> {
        let [batch, seq] = self.tokens.dims();
        let all = || vec![true; batch * (seq - 1)];
        self.targets.clone().unwrap_or_else(all)
    }

    /// One of the sequences.
    ///
    /// # Errors
    /// [`Error::NoTargets`] if there is nothing to predict in it.
    ///
    /// # Panics
    /// If there is no sequence `at`.
    pub fn sequence(&self, at: usize) -> Result<Self> {
        let [_, seq] = self.tokens.dims();
        let part = |marks: &Vec<bool>, n: usize| marks[at * n..(at + 1) * n].to_vec();
        let one = Self {
            tokens: self.tokens().narrow(0, at, 1),
            spans: Spans {
                starts: self.spans.starts().map(|starts| starts.narrow(0, at, 1)),
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

    /// The places of the tokens to be predicted among all after the first of their sequences, row by
    /// row; none if all are.
    pub(crate) fn target_rows(&self) -> Option<Tensor<1, Int>> {
        let rows = (0i64..).zip(self.targets.as_ref()?);
        let rows: Vec<i64> = rows.filter(|(_, is)| **is).map(|(row, _)| row).collect();
        Some(Tensor::from_data(rows.as_slice(), &self.tokens.device()))
    }

    /// `values`, `[batch, seq - 1]`, of each token after the first: nothing for those that are not to
    /// be predicted.
    pub fn of_targets(&self, values: Tensor<2>) -> Tensor<2> {
        let Some(targets) = &self.targets else {
            return values;
        };
        let marks: Vec<f32> = targets.iter().map(|&mark| f32::from(mark)).collect();
        let place = (&values.device(), values.dtype());
        let marks = TensorData::new(marks, values.dims());
        values * Tensor::from_data(marks, place)
    }

    /// The rows of `x`, `[batch, seq, d]`, without those of tokens that fill a sequence up.
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

    /// Tokens to be predicted; at least one.
    pub fn n_targets(&self) -> usize {
        let [batch, seq] = self.tokens.dims();
        match &self.targets {
            Some(targets) => targets.iter().filter(|&&is_target| is_target).count(),
            None => batch * (seq - 1),
        }
    }
}

/// For each mark where its text begins, and how many texts there are.
fn runs(marks: &[bool]) -> (Vec<usize>, usize) {
    let (mut start, mut n_texts) = (0, usize::from(marks[0]));
    let begins = marks.iter().enumerate().map(|(at, mark)| {
        if at > 0 && *mark != marks[at - 1] {
            start = at;
            n_texts += usize::from(*mark);
        }
        match mark {
            true => start,
            // Each token of padding by itself: however many there are, they are no long text.
            false => at,
        }
    });
    (begins.collect(), n_texts)
}
