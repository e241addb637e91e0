//! Random weights and quantizers, and tensors as values.

use std::ops::Range;

use burn::tensor::{Device, Distribution, Tensor, TensorData};
use proptest::prelude::*;
use quant_core::{
    DoubleQuant, Gram, Grid, GroupRange, NormalFloat, Optq, Order, QuantTensor, Quantizer, Rtn,
    ScaleLevels,
};

pub(crate) fn tensor(values: Vec<f32>, dims: [usize; 2]) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

pub(crate) fn values(t: Tensor<2>) -> Vec<f32> {
    t.into_data().try_into_vec().unwrap()
}

/// The scales of each group, double-quantized or not.
pub(crate) fn scales(packed: &QuantTensor) -> Vec<f32> {
    values(packed.scales())
}

/// Values from -1 to 1 without a pattern, `[d_in, d_out]`.
pub(crate) fn scattered(dims: [usize; 2]) -> Tensor<2> {
    let value = |at: usize| ((at * 7919 % 1009) as f32 - 504.0) / 504.0;
    tensor((0..dims[0] * dims[1]).map(value).collect(), dims)
}

/// A weight, and rounding to nearest on some uniform grid.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) dims: [usize; 2],
    pub(crate) weight: Vec<f32>,
    pub(crate) rtn: Rtn,
}

pub(crate) fn cases() -> impl Strategy<Value = Case> {
    (1..80usize, 1..80usize)
        .prop_flat_map(|(d_in, d_out)| {
            let value = prop_oneof![
                8 => -1.0..1.0f32,
                1 => Just(0.0f32),
                1 => -1e4..1e4f32,
            ];
            let weight = prop::collection::vec(value, d_in * d_out);
            let bits = prop::sample::select(vec![2, 3, 4, 8]);
            (
                Just([d_in, d_out]),
                weight,
                bits,
                prop::option::of(1..=d_in),
                any::<bool>(),
            )
        })
        .prop_map(|(dims, weight, bits, group_size, symmetric)| Case {
            dims,
            weight,
            rtn: Rtn::new()
                .with_bits(bits)
                .with_group_size(group_size)
                .with_symmetric(symmetric),
        })
}

impl Case {
    pub(crate) fn tensor(&self) -> Tensor<2> {
        tensor(self.weight.clone(), self.dims)
    }

    pub(crate) fn quantize(&self) -> QuantTensor {
        self.rtn.quantize(self.tensor(), None).unwrap().weight
    }

    pub(crate) fn group_size(&self) -> usize {
        let format = self.rtn.format().unwrap();
        format.group_size().unwrap_or(self.dims[0])
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Method {
    Rtn(Rtn),
    NormalFloat(NormalFloat),
    Optq(Optq),
}

impl Method {
    pub(crate) fn get(&self) -> &dyn Quantizer {
        match self {
            Method::Rtn(method) => method,
            Method::NormalFloat(method) => method,
            Method::Optq(method) => method,
        }
    }
}

/// A weight with any quantizer, and the Gram matrix of random inputs.
#[derive(Clone, Debug)]
pub(crate) struct AnyCase {
    pub(crate) dims: [usize; 2],
    pub(crate) weight: Vec<f32>,
    pub(crate) method: Method,
    pub(crate) gram: Gram,
}

pub(crate) fn any_cases() -> impl Strategy<Value = AnyCase> {
    cases_of(0..17)
}

pub(crate) fn rtn_cases() -> impl Strategy<Value = AnyCase> {
    cases_of(0..4)
}

pub(crate) fn codebook_cases() -> impl Strategy<Value = AnyCase> {
    cases_of(4..9)
}

pub(crate) fn optq_cases() -> impl Strategy<Value = AnyCase> {
    cases_of(9..17)
}

fn cases_of(kinds: Range<u8>) -> impl Strategy<Value = AnyCase> {
    let orders = vec![
        Order::Natural,
        Order::Descending,
        Order::DescendingByGroup,
        Order::DescendingRegrouped,
    ];
    let orders = prop::sample::select(orders);
    (cases(), kinds, orders, any::<u64>()).prop_map(|(case, kind, order, seed)| {
        let Case { dims, weight, rtn } = case;
        let format = rtn.format().unwrap();
        let (bits, group) = (format.bits(), format.group_size());
        let narrow = bits.min(4);
        let nf = NormalFloat::new().with_bits(narrow).with_block_size(group);
        let optq = Optq::new()
            .with_bits(bits)
            .with_group_size(group)
            .with_symmetric(format.grid() == Grid::Symmetric)
            .with_order(order);
        let fractional = optq.with_fractional_zeros(true).with_f16_scales(true);
        let unsigned = DoubleQuant {
            levels: ScaleLevels::Unsigned { bits },
            block_size: 5,
        };
        let method = match kind {
            0 => Method::Rtn(rtn),
            1 => Method::Rtn(rtn.with_range(GroupRange::Clipped)),
            2 => Method::Rtn(rtn.with_range(GroupRange::ClippedForOutput)),
            3 => Method::Rtn(rtn.with_per_tensor(true)),
            4 => Method::NormalFloat(nf),
            5 => Method::NormalFloat(nf.with_offset_by_bits(true)),
            6 => Method::NormalFloat(NormalFloat::float4().with_block_size(group)),
            7 => Method::NormalFloat(nf.with_double_quant(DoubleQuant::dynamic())),
            8 => Method::NormalFloat(nf.with_double_quant(unsigned)),
            9 => Method::Optq(optq),
            10 => Method::Optq(optq.with_stale_groups(true)),
            11 => Method::Optq(optq.with_range(GroupRange::Clipped).with_f16_scales(true)),
            12 => Method::Optq(optq.with_range(GroupRange::ClippedForOutput)),
            13 => Method::Optq(optq.with_drift(0.25)),
            14 => Method::Optq(optq.with_fractional_zeros(true)),
            15 => Method::Optq(fractional.with_range(GroupRange::Clipped)),
            _ => Method::Optq(optq.with_fractional_zeros(true).with_stale_groups(true)),
        };
        let device = Device::flex();
        device.seed(seed);
        let mut gram = Gram::new(dims[0], &device);
        let normal = Distribution::Normal(0.0, 1.0);
        let x = Tensor::<2>::random([2 * dims[0], dims[0]], normal, &device);
        gram.update_with_drift(x.clone(), x * 1.1);
        AnyCase {
            dims,
            weight,
            method,
            gram,
        }
    })
}

impl AnyCase {
    pub(crate) fn quantize(&self) -> QuantTensor {
        let weight = tensor(self.weight.clone(), self.dims);
        let quantized = self.method.get().quantize(weight, Some(&self.gram));
        quantized.unwrap().weight
    }

    /// Groups of one sign, and a group with an outlier.
    pub(crate) fn hard(&self, outlier: f32) -> [Self; 3] {
        let with = |weight: Vec<f32>| Self {
            weight,
            ..self.clone()
        };
        let mut outlying = self.weight.clone();
        outlying[0] = outlier;
        [
            with(self.weight.iter().map(|w| w.abs()).collect()),
            with(self.weight.iter().map(|w| -w.abs()).collect()),
            with(outlying),
        ]
    }
}
