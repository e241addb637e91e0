//! The scales and zeros that a file format can hold, and the rounding of others to them.

use burn::tensor::{DType, Tensor, TensorData};
use half::f16;

use crate::values::floats;
use crate::{Error, QuantTensor, Result};

/// The scales and zeros that a file format can hold.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use quant_core::{Error, QuantTensor, Quantizer, Rtn, StoredGrid};
///
/// let device = Device::flex();
/// let weight = Tensor::<2>::from_floats([[0.0], [0.3], [1.1], [3.3]], &device);
/// let packed = Rtn::new().with_bits(2).quantize(weight, None)?.weight;
/// let gptq = StoredGrid::new().with_f16_scales(true).with_whole_zeros_from(0);
/// assert!(StoredGrid::new().holds(&packed) && !gptq.holds(&packed));
/// let rounded = packed.clone().rounded_to(gptq)?;
/// assert!(gptq.holds(&rounded));
/// assert_eq!(rounded.codes(), packed.codes());
///
/// let huge = packed.clone().with_grid(packed.scales() * 1e5, packed.zeros())?;
/// assert!(matches!(huge.rounded_to(gptq), Err(Error::BeyondF16 { .. })));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredGrid {
    f16_scales: bool,
    f16_minimums: bool,
    least_zero: Option<u8>,
}

impl StoredGrid {
    /// A format that holds all scales and zeros.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether scales are `f16`; false by default.
    pub fn with_f16_scales(mut self, f16_scales: bool) -> Self {
        self.f16_scales = f16_scales;
        self
    }

    /// Sets whether an affine weight is stored as `s q + m`, with minimums `m = -s z` in `f16`, as in GGUF; false
    /// by default.
    pub fn with_f16_minimums(mut self, f16_minimums: bool) -> Self {
        self.f16_minimums = f16_minimums;
        self
    }

    /// Sets the least zero of a format whose zeros are whole, up to the highest code; any by default.
    pub fn with_whole_zeros_from(mut self, least: impl Into<Option<u8>>) -> Self {
        self.least_zero = least.into();
        self
    }

    /// Whether scales are `f16`.
    pub fn f16_scales(&self) -> bool {
        self.f16_scales
    }

    /// Whether minimums are `f16`.
    pub fn f16_minimums(&self) -> bool {
        self.f16_minimums
    }

    /// Whether zeros are whole.
    pub fn whole_zeros(&self) -> bool {
        self.least_zero.is_some()
    }

    /// Whether the format holds the scales and zeros of a weight exactly.
    ///
    /// Double-quantized scales are held by their codes.
    pub fn holds(&self, weight: &QuantTensor) -> bool {
        let same = |values: &[f32], stored: &dyn Fn(f32) -> f32| {
            let same = |&value: &f32| stored(value).to_bits() == value.to_bits();
            values.iter().all(same)
        };
        let scales = || self.keeps_scales(weight) || same(&floats(weight.scales()), &in_f16);
        let zeros = || match (self.stored_zero(weight), weight.zeros()) {
            (Some(stored), Some(zeros)) => same(&floats(zeros), &stored),
            _ => true,
        };
        let minimums = || match weight.zeros() {
            Some(zeros) if self.f16_minimums => {
                let (scales, zeros) = (floats(weight.scales()), floats(zeros));
                let same = |(&scale, &zero): (&f32, &f32)| {
                    zero_of(f16_minimum(scale, zero), scale).to_bits() == zero.to_bits()
                };
                scales.iter().zip(&zeros).all(same)
            }
            _ => true,
        };
        scales() && zeros() && minimums()
    }

    fn keeps_scales(&self, weight: &QuantTensor) -> bool {
        !self.f16_scales || weight.double_scales().is_some()
    }

    /// The zero that a file holds in the place of another one.
    fn stored_zero(&self, weight: &QuantTensor) -> Option<impl Fn(f32) -> f32 + use<>> {
        let highest = ((1 << weight.format().bits()) - 1) as f32;
        let least = f32::from(self.least_zero?).min(highest);
        // A zero of -0 is not the same number of codes.
        Some(move |zero: f32| zero.round_ties_even().clamp(least, highest) + 0.0)
    }
}

/// The `f16` nearest to the weight of code 0.
pub(crate) fn f16_minimum(scale: f32, zero: f32) -> f32 {
    f16::from_f32(-scale * zero).to_f32()
}

/// The zero of a group whose code 0 has the weight `minimum`; 0 where the scale is.
pub(crate) fn zero_of(minimum: f32, scale: f32) -> f32 {
    if scale == 0.0 {
        return 0.0;
    }
    // Without a zero of -0.
    -minimum / scale + 0.0
}

/// The nearest `f16` to a scale, but the one of the least magnitude where that is 0: no group vanishes.
pub(crate) fn in_f16(scale: f32) -> f32 {
    let rounded = f16::from_f32(scale).to_f32();
    if rounded == 0.0 && scale != 0.0 {
        f16::from_bits(1).to_f32().copysign(scale)
    } else {
        rounded
    }
}

impl QuantTensor {
    /// The weight with the nearest scales and zeros that `stored` holds, on the same codes.
    ///
    /// A scale that `f16` would make 0 becomes the least one above it.
    ///
    /// A weight that it holds already is returned as it is.
    ///
    /// # Errors
    /// [`Error::BeyondF16`] if a scale is too large for `f16`.
    pub fn rounded_to(self, stored: StoredGrid) -> Result<Self> {
        if stored.holds(&self) {
            return Ok(self);
        }
        let d_out = self.layout().d_out();
        let (shape, device) = (self.layout().grid_shape(), self.device());
        let tensor = |values: Vec<f32>| {
            Tensor::from_data(TensorData::new(values, shape), (&device, DType::F32))
        };
        let exact = floats(self.scales());
        let mut scales = exact.clone();
        let beyond = |at: usize, value: f32| Error::BeyondF16 {
            scale: value,
            group: at / d_out,
            column: at % d_out,
        };
        if !stored.keeps_scales(&self) {
            for (at, scale) in scales.iter_mut().enumerate() {
                let rounded = in_f16(*scale);
                if rounded.is_infinite() {
                    return Err(beyond(at, *scale));
                }
                *scale = rounded;
            }
        }
        let zeros = self.zeros().map(floats);
        let mut zeros = match (zeros, stored.stored_zero(&self)) {
            (Some(zeros), Some(stored)) => Some(zeros.into_iter().map(stored).collect()),
            (zeros, _) => zeros,
        };
        if let Some(zeros) = zeros.as_mut().filter(|_| stored.f16_minimums) {
            for (at, zero) in zeros.iter_mut().enumerate() {
                let minimum = f16_minimum(exact[at], *zero);
                if minimum.is_infinite() {
                    return Err(beyond(at, -exact[at] * *zero));
                }
                *zero = zero_of(minimum, scales[at]);
            }
        }
        self.with_grid(tensor(scales), zeros.map(tensor))
    }
}
