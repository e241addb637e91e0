//! The forward pass of a model.

use burn::module::Module;
use burn::tensor::Device;
use models::Model;
use peft::{Batch, CausalLm, Linears, Stages, State};
use proptest::prelude::*;

use super::fixtures::*;
use super::quantize::{batches, model, opt_model};

proptest! {
    #![proptest_config(cases(24))]

    /// Another token changes no logit before it, and those within the smallest window after it.
    #[test]
    fn no_token_sees_the_future(config in configs(), at in 0..12usize, seed in 0..100u64) {
        let model = Model::init(&config, seed, &Device::flex());
        let mut other = PROBE;
        other[at] = 15 - other[at];
        let (first, second) = (logits(&model, &PROBE, 1), logits(&model, &other, 1));
        let width = config.vocab_size();
        for (position, (first, second)) in first.chunks(width).zip(second.chunks(width)).enumerate() {
            let largest = first.iter().zip(second).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let as_it_should = match position {
                _ if position < at => largest < 1e-6,
                _ => largest > 0.0 || position >= at + 5,
            };
            prop_assert!(as_it_should, "position {position} changed by {largest}");
        }
    }

    /// A sequence has the same logits beside another one.
    #[test]
    fn sequences_of_a_batch_are_independent(config in configs(), seed in 0..100u64) {
        let model = Model::init(&config, seed, &Device::flex());
        let reversed: Vec<i32> = PROBE.iter().rev().copied().collect();
        let alone = [logits(&model, &PROBE, 1), logits(&model, &reversed, 1)].concat();
        let together = logits(&model, &[PROBE.to_vec(), reversed].concat(), 2);
        for (a, b) in alone.iter().zip(&together) {
            prop_assert!((a - b).abs() < 1e-5);
        }
    }

    /// Documents in one row have the losses that each has alone, and so has a document with padding on
    /// either side. The others change none of their bits.
    #[test]
    fn texts_of_a_row_do_not_see_each_other(
        config in configs(),
        cut in 2..10usize,
        n_fill in 0..3usize,
        seed in 0..100u64,
    ) {
        let model = Model::init(&config, seed, &Device::flex()).map(&mut Unround);
        let (first, second) = PROBE.split_at(cut);
        let nll = |batch: &Batch| -> Vec<f32> {
            peft::token_nll(&model, batch).into_data().try_into_vec().unwrap()
        };
        let alone = |text: &[i32]| nll(&Batch::new(tokens(text, 1)).unwrap());
        let starts: Vec<usize> = (0..12).map(|at| if at < cut { 0 } else { cut }).collect();
        let packed = Batch::new(tokens(&PROBE, 1)).unwrap().with_starts(&starts).unwrap();
        prop_assert_eq!(packed.n_targets(), 10);
        let mut expected = alone(first);
        expected.push(0.0);
        expected.extend(alone(second));
        let found = nll(&packed);
        let near = |a: &[f32], b: &[f32]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5)
        };
        prop_assert!(near(&found, &expected), "{found:?}, {expected:?}");

        // The first text changes nothing of the second one's.
        let mut other = PROBE;
        other[..cut].reverse();
        let other = Batch::new(tokens(&other, 1)).unwrap().with_starts(&starts).unwrap();
        prop_assert_eq!(bits(nll(&other)[cut..].to_vec()), bits(found[cut..].to_vec()));

        for (before, after) in [(n_fill, 0), (0, n_fill), (n_fill, 1)] {
            let ids = [&vec![7; before], first, &vec![3; after]].concat();
            let is_text: Vec<bool> =
                (0..ids.len()).map(|at| (before..before + cut).contains(&at)).collect();
            let batch = Batch::new(tokens(&ids, 1)).unwrap().with_padding(&is_text).unwrap();
            prop_assert_eq!(batch.n_targets(), cut - 1);
            let found = nll(&batch);
            let own = &found[before..before + cut - 1];
            prop_assert!(near(own, &alone(first)), "{found:?}");
            let rest = found[..before].iter().chain(&found[before + cut - 1..]);
            prop_assert!(rest.into_iter().all(|&loss| loss == 0.0));
        }
    }
}

#[test]
fn the_stages_are_the_forward_pass() {
    let batch = &batches(1)[0];
    for model in [model(), opt_model(true), opt_model(false)] {
        let stages = model.stages();
        let all: Vec<usize> = stages.iter().cloned().flatten().collect();
        assert_eq!(all, (0..model.linears().len()).collect::<Vec<_>>());
        let mut state = State::start(&model, batch);
        for (stage, range) in stages.iter().enumerate() {
            let [_, _, d_in] = model.input(stage, &state).dims();
            for (path, linear) in &model.linears()[range.clone()] {
                assert_eq!(linear.weight().dims()[0], d_in, "{path}");
            }
            state = model.advance(stage, state);
        }
        assert!(state.input.is_none());
        let x = model.norm(state.residual);
        let [batch_size, seq, width] = x.dims();
        let logits = model.head().logits(x.reshape([batch_size * seq, width]));
        assert!(values(logits) == values(model.forward(batch.tokens())));
    }
}
