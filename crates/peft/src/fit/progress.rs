//! Where a training is: what its next step depends on besides the parameters and the optimizer.

use std::collections::BTreeSet;

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde::{Deserialize, Serialize};

use super::parameters::Values;
use crate::{BestEvaluation, FitConfig, Step};

pub(super) struct Progress {
    /// The steps so far.
    pub(super) steps: Vec<Step>,
    /// The order of the batches in the epoch of the last step.
    pub(super) order: Vec<usize>,
    shuffle: ChaCha8Rng,
    dropout: ChaCha8Rng,
    noise: ChaCha8Rng,
    pub(super) notes: Notes,
    /// The parameters of the best evaluation; none if they are not restored in the end.
    pub(super) best: Values,
}

/// What is counted on the way.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Notes {
    /// The parameters that had a gradient that was not zero.
    pub(super) moved: BTreeSet<String>,
    /// The steps that were skipped.
    pub(super) n_skipped: usize,
    pub(super) best: Option<BestEvaluation>,
    /// The evaluations since the best one.
    pub(super) n_worse: usize,
    /// Whether there are parameters of the best one.
    pub(super) has_best: bool,
}

/// The random states and the counts, as a file has them. The streams are those of the setting `seed`.
#[derive(Serialize, Deserialize)]
pub(super) struct Stored {
    /// The position in the stream that shuffles batches, in words.
    shuffle: u64,
    /// That in the stream that seeds dropout.
    dropout: u64,
    /// That in the stream that seeds noise.
    noise: u64,
    #[serde(flatten)]
    notes: Notes,
}

impl Progress {
    pub(super) fn new(config: &FitConfig, n_batches: usize) -> Self {
        let stream = |stream| {
            let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
            rng.set_stream(stream);
            rng
        };
        Self {
            steps: Vec::new(),
            order: (0..n_batches).collect(),
            shuffle: stream(0),
            dropout: stream(1),
            noise: stream(2),
            notes: Notes::default(),
            best: Values::default(),
        }
    }

    /// The batches of the next step, in which an epoch may begin.
    pub(super) fn choose(&mut self, accumulation: usize) -> Vec<usize> {
        let per_epoch = self.order.len().div_ceil(accumulation);
        let at = self.steps.len() % per_epoch;
        if at == 0 {
            self.order.shuffle(&mut self.shuffle);
        }
        let first = at * accumulation;
        let end = self.order.len().min(first + accumulation);
        self.order[first..end].to_vec()
    }

    /// The seed of dropout for the next batch.
    pub(super) fn next_dropout(&mut self) -> u64 {
        self.dropout.next_u64()
    }

    /// The seed of noise for the next batch.
    pub(super) fn next_noise(&mut self) -> u64 {
        self.noise.next_u64()
    }

    /// Takes note of the parameters whose gradient, with this square of its norm, is not zero.
    pub(super) fn note_moved(&mut self, squares: &[(String, f64)]) {
        let moved = &mut self.notes.moved;
        for (path, square) in squares {
            if *square > 0.0 && !moved.contains(path) {
                moved.insert(path.clone());
            }
        }
    }

    /// Takes note of an evaluation after step `step`; whether it is the best so far.
    pub(super) fn evaluated(&mut self, step: usize, loss: f64) -> bool {
        let is_best = self.notes.best.is_none_or(|best| loss < best.loss);
        if is_best {
            self.notes.best = Some(BestEvaluation { step, loss });
            self.notes.n_worse = 0;
        } else {
            self.notes.n_worse += 1;
        }
        is_best
    }

    pub(super) fn stored(&self) -> Stored {
        // They fit: a stream of 2^64 words is not used up.
        Stored {
            shuffle: self.shuffle.get_word_pos() as u64,
            dropout: self.dropout.get_word_pos() as u64,
            noise: self.noise.get_word_pos() as u64,
            notes: self.notes.clone(),
        }
    }

    /// Goes to where a file says; what is wrong with it otherwise.
    pub(super) fn restore(
        &mut self,
        steps: Vec<Step>,
        order: Vec<u32>,
        stored: Stored,
    ) -> Result<(), String> {
        let order: Vec<usize> = order.into_iter().map(|at| at as usize).collect();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..self.order.len()) {
            return Err(format!("is no order of {} batches", self.order.len()));
        }
        if let Some((at, step)) = (1..).zip(&steps).find(|(at, step)| step.index != *at) {
            return Err(format!("has step {} in the place of {at}", step.index));
        }
        self.order = order;
        self.steps = steps;
        self.shuffle.set_word_pos(stored.shuffle.into());
        self.dropout.set_word_pos(stored.dropout.into());
        self.noise.set_word_pos(stored.noise.into());
        self.notes = stored.notes;
        Ok(())
    }
}
