use std::ops::Range;

use burn::tensor::{Int, Tensor};
use peft::Linears;

/// A model whose projections can be run, and so calibrated, a few at a time.
///
/// A stage is a set of projections that read the same input. Stages follow each other from the
/// embedding to the head; the forward pass of the model is [`start`](Stages::start), every
/// [`advance`](Stages::advance) in turn, and the head.
pub trait Stages: Linears {
    /// What a batch carries from one stage to the next.
    type State: Clone;

    /// The projections of each stage, as places in [`Linears::linears`].
    fn stages(&self) -> Vec<Range<usize>>;

    /// The state of a batch of tokens, `[batch, seq]`, before the first stage.
    fn start(&self, tokens: Tensor<2, Int>) -> Self::State;

    /// The input of the projections of the next stage, `[batch, seq, d_in]`.
    fn input(state: &Self::State) -> Tensor<3>;

    /// The state after `stage`.
    fn advance(&self, stage: usize, state: Self::State) -> Self::State;
}
