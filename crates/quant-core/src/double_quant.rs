//! Double quantization: the scales of a weight as codes.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::values::{check_finite, check_length, floats, frozen_floats, frozen_words, words};
use crate::{Error, Result, codebook};

/// The levels that the codes of double-quantized scales stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleLevels {
    /// bitsandbytes' signed dynamic map of 8 bits, around the mean of the scales (Dettmers et al.
    /// 2023, arXiv:2305.14314, §3).
    Dynamic,
    /// `0 ..= 2^bits - 1` equal steps above the smallest scale, as in LQ-LoRA (Guo et al. 2024,
    /// arXiv:2311.12023). A code takes a byte in memory.
    Unsigned {
        /// 2 to 8.
        bits: usize,
    },
}

impl ScaleLevels {
    /// Bits of a code.
    pub(crate) fn bits(self) -> usize {
        match self {
            ScaleLevels::Dynamic => 8,
            ScaleLevels::Unsigned { bits } => bits,
        }
    }
}

/// The format of scales that are codes themselves: `s = level(code) · absmax + offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DoubleQuant {
    /// The levels that codes stand for.
    pub levels: ScaleLevels,
    /// The number of scales that share an `absmax`, counted output by output.
    pub block_size: usize,
}

impl DoubleQuant {
    /// The double quantization of bitsandbytes and QLoRA: the dynamic map in blocks of 256.
    pub const fn dynamic() -> Self {
        Self {
            levels: ScaleLevels::Dynamic,
            block_size: 256,
        }
    }
}

impl fmt::Display for DoubleQuant {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}-bit ", self.levels.bits())?;
        if self.levels == ScaleLevels::Dynamic {
            f.write_str("dynamic ")?;
        }
        write!(f, "scales in blocks of {}", self.block_size)
    }
}

/// Double-quantized scales on the host: `s = level(code) · absmax + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct DoubleScales {
    /// `[d_out, n_groups]`, row by row: output by output, as bitsandbytes flattens a weight.
    pub codes: Vec<u8>,
    /// One for each block of codes.
    pub absmax: Vec<f32>,
    /// The term that is added to every scale.
    pub offset: f32,
}

impl DoubleScales {
    /// Quantizes scales, `[n_groups, d_out]`.
    pub(crate) fn quantize(scales: &[f32], n_groups: usize, format: DoubleQuant) -> Self {
        let d_out = scales.len() / n_groups;
        let by_output: Vec<f32> = (0..d_out)
            .flat_map(|o| (0..n_groups).map(move |g| scales[g * d_out + o]))
            .collect();
        let offset = match format.levels {
            ScaleLevels::Dynamic => {
                let sum: f64 = by_output.iter().map(|&s| f64::from(s)).sum();
                (sum / by_output.len() as f64) as f32
            }
            ScaleLevels::Unsigned { .. } => by_output.iter().copied().fold(f32::INFINITY, f32::min),
        };
        let levels = scale_levels(format.levels);
        let midpoints: Vec<f32> = levels.windows(2).map(|w| (w[0] + w[1]) / 2.0).collect();
        let mut codes = vec![0; by_output.len()];
        let blocks = by_output.par_chunks(format.block_size);
        let absmax = blocks
            .zip(codes.par_chunks_mut(format.block_size))
            .map(|(block, codes)| {
                let largest = block.iter().map(|s| (s - offset).abs()).fold(0.0, f32::max);
                let divisor = largest.max(f32::MIN_POSITIVE);
                for (code, s) in codes.iter_mut().zip(block) {
                    let value = (s - offset) / divisor;
                    *code = midpoints.partition_point(|&midpoint| midpoint < value) as u8;
                }
                largest
            })
            .collect();
        Self {
            codes,
            absmax,
            offset,
        }
    }

    /// The scales, `[n_groups, d_out]`.
    pub(crate) fn dequantize(&self, n_groups: usize, format: DoubleQuant) -> Vec<f32> {
        let levels = scale_levels(format.levels);
        let d_out = self.codes.len() / n_groups;
        let mut scales = vec![0.0; self.codes.len()];
        for (k, &code) in self.codes.iter().enumerate() {
            let (o, g) = (k / n_groups, k % n_groups);
            let absmax = self.absmax[k / format.block_size];
            scales[g * d_out + o] = levels[usize::from(code)] * absmax + self.offset;
        }
        scales
    }
}

/// The double-quantized scales of a [`QuantTensor`](crate::QuantTensor), on its device.
///
/// Each method reads only the values that it returns.
#[derive(Module, Debug)]
pub struct DoubleScaleParams {
    /// Four codes in a word.
    codes: Param<Tensor<1, Int>>,
    absmax: Param<Tensor<1>>,
    offset: Param<Tensor<1>>,
    #[module(skip)]
    format: DoubleQuant,
    #[module(skip)]
    n_scales: usize,
}

impl DoubleScaleParams {
    pub(crate) fn new(
        scales: DoubleScales,
        format: DoubleQuant,
        n_scales: usize,
        device: &Device,
    ) -> Result<Self> {
        let n_blocks = n_scales.div_ceil(format.block_size);
        check_length("scale codes", n_scales, scales.codes.len())?;
        check_length("absmax", n_blocks, scales.absmax.len())?;
        check_finite("the absmax of the scales", &scales.absmax, 1)?;
        check_finite("the offset of the scales", &[scales.offset], 1)?;
        let n_levels = scale_levels(format.levels).len();
        if let Some(&code) = scales.codes.iter().find(|&&c| usize::from(c) >= n_levels) {
            return Err(Error::ScaleCode { code, n_levels });
        }
        check_finite("the scales", &scales.dequantize(1, format), 1)?;
        let mut bytes = scales.codes;
        bytes.resize(n_scales.next_multiple_of(4), 0);
        let (words, _) = bytes.as_chunks::<4>();
        let words: Vec<u32> = words.iter().map(|&word| u32::from_le_bytes(word)).collect();
        let n_words = words.len();
        Ok(Self {
            codes: frozen_words(words, [n_words], device),
            absmax: frozen_floats(scales.absmax, [n_blocks], device),
            offset: frozen_floats(vec![scales.offset], [1], device),
            format,
            n_scales,
        })
    }

    /// The codes, `[d_out, n_groups]`, row by row.
    pub fn codes(&self) -> Vec<u8> {
        let words = words(self.codes.val());
        let mut codes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        codes.truncate(self.n_scales);
        codes
    }

    /// The absolute maximum of each block.
    pub fn absmax(&self) -> Vec<f32> {
        floats(self.absmax.val())
    }

    /// The term that is added to every scale.
    pub fn offset(&self) -> f32 {
        floats(self.offset.val())[0]
    }

    /// All of them, on the host.
    pub fn to_host(&self) -> DoubleScales {
        DoubleScales {
            codes: self.codes(),
            absmax: self.absmax(),
            offset: self.offset(),
        }
    }

    pub(crate) fn device(&self) -> Device {
        self.absmax.val().device()
    }

    /// The scales, `[n_groups, d_out]`.
    pub(crate) fn dequantize(&self, [n_groups, d_out]: [usize; 2]) -> Tensor<2> {
        let n = self.n_scales;
        let (shifts, table) = on_device(self.format.levels, &self.device());
        let n_words = n.div_ceil(4);
        let words = self.codes.val().reshape([n_words, 1]).expand([n_words, 4]);
        let codes = words
            .bitwise_right_shift(shifts.reshape([1, 4]).expand([n_words, 4]))
            .bitwise_and_scalar(255)
            .reshape([4 * n_words])
            .narrow(0, 0, n);
        let levels = table.select(0, codes);

        let block = self.format.block_size;
        let n_blocks = n.div_ceil(block);
        let absmax = self.absmax.val().reshape([n_blocks, 1]);
        let absmax = absmax.expand([n_blocks, block.min(n)]);
        let absmax = absmax.reshape([n_blocks * block.min(n)]).narrow(0, 0, n);
        let scales = levels * absmax + self.offset.val();
        scales.reshape([d_out, n_groups]).transpose()
    }
}

/// The shifts of the codes in a word, and the levels that codes stand for, on a device. They are uploaded once: each
/// product uses them. They are constants, also to a model that trains.
fn on_device(levels: ScaleLevels, device: &Device) -> (Tensor<1, Int>, Tensor<1>) {
    type Uploaded = (Device, ScaleLevels, Tensor<1, Int>, Tensor<1>);
    static UPLOADED: Mutex<Vec<Uploaded>> = Mutex::new(Vec::new());

    // Devices are equal with autodiff and without.
    let device = &device.clone().without_autodiff();
    let mut uploaded = UPLOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut found = uploaded.iter();
    if let Some((_, _, shifts, table)) = found.find(|(on, of, ..)| (on, *of) == (device, levels)) {
        return (shifts.clone(), table.clone());
    }
    let shifts = TensorData::from([0u32, 8, 16, 24]);
    let shifts = Tensor::from_data(shifts, (device, DType::U32));
    let table = scale_levels(levels);
    let n_levels = table.len();
    let table = Tensor::from_data(TensorData::new(table, [n_levels]), (device, DType::F32));
    uploaded.push((device.clone(), levels, shifts.clone(), table.clone()));
    (shifts, table)
}

/// The levels that the codes of double-quantized scales stand for, in ascending order.
///
/// # Panics
/// If the codes have more than 8 bits, which no [`Format`](crate::Format) has.
pub fn scale_levels(levels: ScaleLevels) -> Vec<f32> {
    match levels {
        ScaleLevels::Dynamic => codebook::dynamic_map().into(),
        ScaleLevels::Unsigned { bits } => {
            assert!(bits <= 8, "the code of a scale is a byte");
            let steps = (1 << bits) - 1;
            (0..=steps).map(|k| k as f32 / steps as f32).collect()
        }
    }
}
