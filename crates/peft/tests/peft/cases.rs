//! Methods, bases, and how each pair merges.

use peft::{Bayesian, Lora, Method, Peqa, Pooling, Targets, Tile, TileMethod, Vera};
use proptest::prelude::*;
use quant_core::{DoubleQuant, Grid, NormalFloat, Quantizer, Rtn};

use crate::model::{Bigram, HIDDEN, WIDTH, dense, quantized};

/// The weights of a model: dense, or packed by a quantizer.
#[derive(Clone, Debug)]
pub(crate) enum Base {
    Dense,
    Rtn(Rtn),
    NormalFloat(NormalFloat),
}

impl Base {
    pub(crate) fn model(&self, seed: u64) -> Bigram {
        match self {
            Base::Dense => dense(seed),
            Base::Rtn(rtn) => quantized(seed, rtn),
            Base::NormalFloat(nf) => quantized(seed, nf),
        }
    }

    /// Whether scales are `f16`.
    pub(crate) fn has_f16_scales(&self) -> bool {
        matches!(self, Base::Rtn(rtn) if *rtn == rtn.with_f16_scales(true))
    }
}

/// Widths of codes, groups that divide, that leave a short one, and one per channel.
pub(crate) fn bases() -> impl Strategy<Value = Base> {
    let bits = prop::sample::select(vec![2, 3, 4, 8]);
    let group_size = prop::sample::select(vec![None, Some(32), Some(64), Some(128), Some(48)]);
    let settings = (
        bits,
        group_size.clone(),
        prop::bool::weighted(0.25),
        any::<bool>(),
    );
    let rtn = settings.prop_map(|(bits, group_size, symmetric, f16_scales)| {
        let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
        Base::Rtn(rtn.with_symmetric(symmetric).with_f16_scales(f16_scales))
    });
    let nf = (group_size, any::<bool>()).prop_map(|(block_size, double)| {
        let nf = NormalFloat::new().with_block_size(block_size);
        Base::NormalFloat(if double {
            nf.with_double_quant(DoubleQuant::dynamic())
        } else {
            nf
        })
    });
    prop_oneof![1 => Just(Base::Dense), 6 => rtn, 1 => nf]
}

#[derive(Clone, Debug)]
pub(crate) enum Tuning {
    Peqa(Peqa),
    Lora(Lora, /* parameters */ usize),
    Tile(Tile, TileMethod),
    Bayesian(Bayesian),
    Vera(Vera),
}

pub(crate) fn tunings() -> impl Strategy<Value = Tuning> {
    let alpha = prop::sample::select(vec![0.7, 4.0, 16.0]);
    let lora = (1..=HIDDEN, alpha.clone(), any::<(u64, bool, bool)>()).prop_map(
        |(rank, alpha, (seed, rank_stabilized, dora))| {
            let lora = Lora::new(rank).with_alpha(alpha).with_seed(seed);
            let lora = lora.with_rank_stabilized(rank_stabilized).with_dora(dora);
            // The bias of `up` trains, `down` has none.
            let bias = rank.is_multiple_of(2);
            let n_parameters = 4 + 2 * usize::from(dora) + usize::from(bias);
            Tuning::Lora(lora.with_bias(bias), n_parameters)
        },
    );
    let pooling = prop::sample::select(vec![Pooling::Sum, Pooling::Mean, Pooling::Peft]);
    let tile = (0..4usize, 1..=4usize, alpha, pooling, any::<u64>()).prop_map(
        |(method, rank, alpha, pooling, seed)| {
            let (tile, method) = match method {
                // A group of -1 leaves one pool, whose product has rank 1.
                0 => (Tile::qa_lora(1), TileMethod::QaLora),
                1 => (Tile::q_bara(rank), TileMethod::QBara),
                2 => (
                    Tile::qa_hira().with_repeat(rank.next_power_of_two()),
                    TileMethod::QaHira,
                ),
                _ => (Tile::qa_blora(1), TileMethod::QaBlora),
            };
            let tile = tile.with_alpha(alpha).with_pooling(pooling).with_seed(seed);
            Tuning::Tile(tile, method)
        },
    );
    let bayesian = (1..=HIDDEN, any::<u64>()).prop_map(|(rank, seed)| {
        Tuning::Bayesian(Bayesian::new(rank).with_alpha(4.0).with_seed(seed))
    });
    let vera = (1..=2 * HIDDEN, any::<u64>())
        .prop_map(|(rank, seed)| Tuning::Vera(Vera::new(rank).with_seed(seed)));
    prop_oneof![
        1 => bayesian,
        1 => vera,
        2 => any::<[bool; 2]>().prop_map(|[zeros, f16]| {
            Tuning::Peqa(Peqa::new().with_zeros(zeros).with_f16_scales(f16))
        }),
        2 => lora,
        4 => tile,
    ]
}

/// An adapter and a base.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) tuning: Tuning,
    pub(crate) base: Base,
}

/// How an adapter merges into its base.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Merge {
    Exact,
    Bounded,
    OffGrid,
}

pub(crate) fn any_cases() -> impl Strategy<Value = Case> {
    (tunings(), bases()).prop_map(|(tuning, base)| Case { tuning, base })
}

/// Two methods that merge into the codes of one base.
pub(crate) fn tasks() -> impl Strategy<Value = (Rtn, [Tuning; 2])> {
    let bits = prop::sample::select(vec![2, 3, 4, 8]);
    let group_size = prop::sample::select(vec![None, Some(32), Some(128)]);
    let tuning = || {
        tunings().prop_filter("stays off the grid", |tuning| {
            !matches!(
                tuning,
                Tuning::Lora(..)
                    | Tuning::Bayesian(_)
                    | Tuning::Vera(_)
                    | Tuning::Tile(_, TileMethod::QBara)
            )
        })
    };
    let cases = (bits, group_size, any::<bool>(), tuning(), tuning());
    cases.prop_map(|(bits, group_size, f16, first, second)| {
        let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
        // Scales are trained in f16 over such a base alone.
        let tunings = [first, second].map(|tuning| match tuning {
            Tuning::Peqa(peqa) if !f16 => Tuning::Peqa(peqa.with_f16_scales(false)),
            other => other,
        });
        (rtn.with_f16_scales(f16), tunings)
    })
}

/// Methods on bases that they can attach to.
pub(crate) fn cases() -> impl Strategy<Value = Case> {
    any_cases().prop_filter("refused", |case| case.merge().is_some())
}

impl Case {
    pub(crate) fn method(&self, targets: impl Into<Targets>) -> Box<dyn Method> {
        match &self.tuning {
            Tuning::Peqa(peqa) => Box::new(peqa.clone().with_targets(targets)),
            Tuning::Lora(lora, _) => Box::new(lora.clone().with_targets(targets)),
            Tuning::Tile(tile, _) => Box::new(tile.clone().with_targets(targets)),
            Tuning::Bayesian(method) => Box::new(method.clone().with_targets(targets)),
            Tuning::Vera(method) => Box::new(method.clone().with_targets(targets)),
        }
    }

    /// The merge that the papers promise for this method on this base; none where it cannot attach.
    pub(crate) fn merge(&self) -> Option<Merge> {
        let affine = match &self.base {
            Base::Rtn(rtn) => rtn.format().unwrap().grid() == Grid::Affine,
            _ => false,
        };
        match (&self.tuning, &self.base) {
            (Tuning::Peqa(_), Base::Dense) => None,
            (Tuning::Peqa(_), _) if self.trains_zeros() && !affine => None,
            (Tuning::Peqa(peqa), _) if *peqa == peqa.clone().with_f16_scales(true) => {
                self.base.has_f16_scales().then_some(Merge::Exact)
            }
            (Tuning::Peqa(_), _) => Some(Merge::Exact),
            (
                Tuning::Lora(..)
                | Tuning::Bayesian(_)
                | Tuning::Vera(_)
                | Tuning::Tile(_, TileMethod::QBara),
                base,
            ) => match base {
                Base::Dense => Some(Merge::Bounded),
                _ => Some(Merge::OffGrid),
            },
            (Tuning::Tile(..), Base::Rtn(rtn)) => {
                let group = rtn.format().unwrap().group_size();
                let divides =
                    group.is_none_or(|n| HIDDEN.is_multiple_of(n) && WIDTH.is_multiple_of(n));
                (affine && divides).then_some(Merge::Bounded)
            }
            (Tuning::Tile(..), _) => None,
        }
    }

    pub(crate) fn adapted(&self, seed: u64) -> Bigram {
        let mut model = self.base.model(seed);
        peft::attach(&mut model, &*self.method(Targets::All)).unwrap();
        model
    }

    /// Parameters of both layers' adapters.
    pub(crate) fn n_parameters(&self) -> usize {
        match &self.tuning {
            Tuning::Peqa(_) => 2 + 2 * usize::from(self.trains_zeros()),
            Tuning::Lora(_, n_parameters) => *n_parameters,
            Tuning::Tile(_, TileMethod::QaHira) => 2,
            Tuning::Tile(..) => 4,
            Tuning::Bayesian(_) => 10,
            Tuning::Vera(_) => 4,
        }
    }

    pub(crate) fn trains_zeros(&self) -> bool {
        match &self.tuning {
            Tuning::Peqa(peqa) => *peqa == peqa.clone().with_zeros(true),
            Tuning::Lora(..) | Tuning::Bayesian(_) | Tuning::Vera(_) => false,
            Tuning::Tile(..) => true,
        }
    }
}
