//! Products with a packed weight on a device, in microseconds by the number of rows, beside the device's
//! dense product: a series of products is given to the device together.
//!
//! `cargo bench --bench products --features cuda -- --device cuda --dtype bf16`

#![expect(clippy::print_stdout, reason = "a program reports its results")]

use benches::{Ceilings, seconds_each, weight};
use burn::tensor::{Distribution, Tensor};
use clap::Parser;
use examples::device::DeviceArg;
use examples::dtype::DtypeArg;
use quant_core::{NormalFloat, Quantizer, Rtn};

/// Measure products with packed weights
#[derive(Parser)]
struct Args {
    /// Inputs and outputs of the weight
    #[arg(long, value_name = "N", default_value_t = 4096)]
    width: usize,
    /// Rows of the other factor
    #[arg(
        long,
        value_name = "N,..",
        value_delimiter = ',',
        default_value = "1,8,64,512,2048"
    )]
    rows: Vec<usize>,
    /// Products that a device is given together
    #[arg(long, value_name = "N", default_value_t = 50)]
    series: usize,
    #[command(flatten)]
    device: DeviceArg,
    #[command(flatten)]
    dtype: DtypeArg,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let device = args.device.open();
    println!("{}", Ceilings::measure(&device));
    let dense = weight(args.width, &device);
    let packed = |quantizer: &dyn Quantizer| quantizer.quantize(dense.clone(), None);
    let g128 = packed(&Rtn::new().with_bits(4).with_group_size(128))?.weight;
    let nf4 = packed(&NormalFloat::new())?.weight;
    let dtype = args.dtype.name.name();
    println!(
        "weight {0} x {0} on {1}, {dtype}, us",
        args.width, args.device.name
    );
    println!("| rows | 4 bits g128 | NF4 | dense | 4 bits, GB/s of codes | 4 bits, TFLOP/s |");
    let dense = dense.cast(args.dtype.name.dtype());
    println!("|---:|---:|---:|---:|---:|---:|");
    for rows in args.rows {
        let x = Tensor::<2>::random([rows, args.width], Distribution::Normal(0.0, 1.0), &device);
        let x = x.cast(args.dtype.name.dtype());
        let time = |run: &dyn Fn() -> Tensor<2>| seconds_each(&device, args.series, run);
        let of_g128 = time(&|| g128.matmul(x.clone()));
        let of_nf4 = time(&|| nf4.matmul(x.clone()));
        let of_dense = time(&|| kernels::matmul(x.clone(), dense.clone()));
        let values = (args.width * args.width) as f64;
        println!(
            "| {rows} | {:.1} | {:.1} | {:.1} | {:.0} | {:.1} |",
            1e6 * of_g128,
            1e6 * of_nf4,
            1e6 * of_dense,
            values / 2.0 / of_g128 / 1e9,
            2.0 * values * rows as f64 / of_g128 / 1e12
        );
    }
    Ok(())
}
